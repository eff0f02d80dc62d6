"""
Street scenes drawn by this code: the data set that needs no download. `draw(index)` gives an
image (96, 160, 3) and its labels (96, 160), both uint8, 255 = ignore; the same picture every time.

The colours overlap on purpose (a wall, a bus and a car may share one; light and haze shift them
all), so that a pixel must be recognised by shape and surroundings.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HEIGHT, WIDTH = 96, 160
# first index and number of scenes; the last are for --unlabelled
SPLITS = {"train": (0, 800), "val": (1_000_000, 200), "unlabelled": (2_000_000, 800)}
CLASSES = (
    ("sky", (70, 130, 180)),
    ("building", (70, 70, 70)),
    ("road", (128, 64, 128)),
    ("sidewalk", (244, 35, 232)),
    ("vegetation", (107, 142, 35)),
    ("car", (0, 0, 142)),
    ("bus", (0, 60, 100)),
    ("person", (220, 20, 60)),
    ("rider", (255, 0, 0)),
    ("pole", (153, 153, 153)),
    ("sign", (220, 220, 0)),
)
SKY, BUILDING, ROAD, SIDEWALK, VEGETATION, CAR, BUS, PERSON, RIDER, POLE, SIGN = range(11)
VOID = 255


class Canvas:
    """Draws each shape twice: in its colour on the image, with its class on the label."""

    def __init__(self, rng):
        self.rng = rng
        self.image = Image.new("RGB", (WIDTH, HEIGHT))
        self.label = Image.new("L", (WIDTH, HEIGHT), SKY)
        self.on_image, self.on_label = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)

    def colour(self, base, spread):
        jitter = self.rng.normal(0, spread, 3) + self.rng.normal(0, spread)
        return tuple(int(c) for c in np.clip(np.add(base, jitter), 0, 255))

    def shape(self, kind, xy, colour, cls=None):
        """kind: rectangle, ellipse or polygon. cls=None paints a detail, on the image alone."""
        getattr(self.on_image, kind)(xy, fill=colour)
        if cls is not None:
            getattr(self.on_label, kind)(xy, fill=cls)


def background(c, horizon):
    rng = c.rng
    top, low = c.colour((110, 150, 200), 30), c.colour((200, 205, 210), 25)
    for y in range(horizon + 1):
        mix = y / max(horizon, 1)
        row = tuple(int(a + (b - a) * mix) for a, b in zip(top, low))
        c.on_image.line((0, y, WIDTH, y), fill=row)
    for _ in range(rng.integers(0, 4)):  # clouds
        x, y, w = rng.integers(0, WIDTH), rng.integers(0, horizon), rng.integers(10, 40)
        c.shape("ellipse", (x, y, x + w, y + w // 4), c.colour((225, 225, 228), 15))
    x = -int(rng.integers(0, 20))
    while x < WIDTH:  # houses, with gaps through which the sky is seen
        w, h = int(rng.integers(14, 42)), int(rng.integers(8, horizon + 4))
        if rng.random() < 0.85:
            house(c, x, horizon + 2, w, h)
        x += w + int(rng.integers(0, 5))


def house(c, x, base, w, h):
    rng = c.rng
    palette = [(150, 90, 75), (175, 165, 150), (120, 125, 135), (200, 190, 165), (90, 85, 95)]
    wall = c.colour(palette[rng.integers(len(palette))], 18)
    c.shape("rectangle", (x, base - h, x + w, base), wall, BUILDING)
    if rng.random() < 0.3:
        roof = [(x - 1, base - h), (x + w // 2, base - h - 7), (x + w + 1, base - h)]
        c.shape("polygon", roof, c.colour((120, 70, 60), 25), BUILDING)
    glass, step = c.colour((70, 85, 105), 35), int(rng.integers(5, 9))
    for wy in range(base - h + 3, base - 4, step):
        for wx in range(x + 2, x + w - 3, step):
            c.shape("rectangle", (wx, wy, wx + 2, wy + 3), glass)


def ground(c, horizon):
    """Sidewalks, and a road that narrows to a vanishing point. Returns road(y) -> (left, right)."""
    rng = c.rng
    vanish = WIDTH / 2 + rng.normal(0, 18)
    left, right = WIDTH * rng.uniform(-0.25, 0.2), WIDTH * rng.uniform(0.8, 1.25)
    c.shape("rectangle", (0, horizon, WIDTH, HEIGHT), c.colour((150, 145, 145), 14), SIDEWALK)
    if rng.random() < 0.5:  # a strip of grass on one side
        edge = 0 if rng.random() < 0.5 else WIDTH
        strip = [(edge, horizon), (vanish, horizon), (edge, HEIGHT * rng.uniform(0.7, 1.0))]
        c.shape("polygon", strip, c.colour((95, 125, 65), 16), VEGETATION)
    asphalt = [(vanish - 5, horizon), (vanish + 5, horizon), (right, HEIGHT), (left, HEIGHT)]
    c.shape("polygon", asphalt, c.colour((108, 106, 110), 14), ROAD)

    def road(y):
        t = (y - horizon) / (HEIGHT - horizon)
        return vanish - 5 + (left - vanish + 5) * t, vanish + 5 + (right - vanish - 5) * t

    for t in np.arange(0.1, 1.0, 0.2):  # lane marks
        y = horizon + (HEIGHT - horizon) * t
        x, w = sum(road(y)) / 2, 0.5 + 2 * t
        mark = [(x - w, y), (x + w, y), (x + w, y + 6 * t), (x - w, y + 6 * t)]
        c.shape("polygon", mark, (215, 212, 205))
    return road


def scaled(x, y, s, *corners):
    """Corners (right, up), in units of s from an object's foot (x, y), as pixel positions."""
    return [(x + right * s, y - up * s) for right, up in corners]


def pick(c, *colours):
    """One of the colours, with the jitter of a painted surface."""
    return c.colour(colours[c.rng.integers(len(colours))], 20)


def tree(c, x, y, s):
    trunk = scaled(x, y, s, (-0.05, 0.6), (0.05, 0))
    c.shape("rectangle", trunk, c.colour((85, 65, 50), 12), VEGETATION)
    leaf = c.colour((70, 105, 55), 22)
    for _ in range(6):
        dx, dy = c.rng.normal(0, 0.16) * s, c.rng.normal(-0.85, 0.12) * s
        r = c.rng.uniform(0.12, 0.3) * s
        shade = tuple(int(v * c.rng.uniform(0.8, 1.15)) for v in leaf)
        c.shape("ellipse", (x + dx - r, y + dy - r, x + dx + r, y + dy + r), shade, VEGETATION)


def wheels(c, x, y, r, places, cls):
    for dx in places:
        c.shape("ellipse", (x + dx - r, y - 2 * r, x + dx + r, y), (30, 30, 32), cls)


def car(c, x, y, s):
    paint = pick(c, (170, 40, 40), (40, 60, 120), (200, 200, 205), (45, 45, 50), (120, 120, 125))
    c.shape("rectangle", scaled(x, y, s, (-0.5, 0.35), (0.5, 0.08)), paint, CAR)
    cabin = scaled(x, y, s, (-0.36, 0.35), (-0.26, 0.6), (0.22, 0.6), (0.36, 0.35))
    c.shape("polygon", cabin, paint, CAR)
    glass = scaled(x, y, s, (-0.28, 0.36), (-0.22, 0.54), (0.18, 0.54), (0.28, 0.36))
    c.shape("polygon", glass, c.colour((80, 95, 110), 20))
    wheels(c, x, y, 0.1 * s, (-0.3 * s, 0.3 * s), CAR)


def bus(c, x, y, s):
    paint = pick(c, (190, 60, 50), (210, 190, 80), (60, 100, 150), (175, 165, 150))
    c.shape("rectangle", scaled(x, y, s, (-0.7, 1), (0.7, 0.1)), paint, BUS)
    glass = c.colour((75, 90, 105), 20)
    for k in range(4):
        x0 = x + (-0.62 + 0.32 * k) * s
        c.shape("rectangle", (x0, y - 0.85 * s, x0 + 0.24 * s, y - 0.5 * s), glass)
    wheels(c, x, y, 0.12 * s, (-0.42 * s, 0.42 * s), BUS)


def figure(c, x, y, s, cls):
    """A person or a rider, who look alike except for the wheels."""
    legs, top = c.colour((60, 60, 80), 30), c.colour((130, 90, 90), 50)
    c.shape("rectangle", scaled(x, y, s, (-0.12, 0.5), (0.12, 0)), legs, cls)
    c.shape("rectangle", scaled(x, y, s, (-0.16, 0.85), (0.16, 0.4)), top, cls)
    head = scaled(x, y, s, (-0.1, 1.05), (0.1, 0.83))
    c.shape("ellipse", head, c.colour((190, 150, 125), 20), cls)
    if cls == RIDER:
        for dx in (-0.3, 0.3):
            box = (x + dx * s - 0.2 * s, y - 0.3 * s, x + dx * s + 0.2 * s, y + 0.1 * s)
            c.shape("ellipse", box, (40, 40, 44), RIDER)


def pole(c, x, y, s):
    grey = c.colour((110, 112, 115), 20)
    c.shape("rectangle", (x, y - 1.9 * s, x + max(1, 0.06 * s), y), grey, POLE)
    if c.rng.random() < 0.7:
        paint = pick(c, (190, 50, 45), (40, 80, 160), (225, 200, 60))
        box = scaled(x, y, s, (-0.22, 1.95), (0.28, 1.5))
        c.shape("ellipse" if c.rng.random() < 0.5 else "rectangle", box, paint, SIGN)


def things(c, horizon, road):
    """Trees, vehicles, people and poles, the farthest first; nearer ones are larger."""
    rng = c.rng
    depths = np.sort(rng.uniform(0.06, 0.95, rng.integers(8, 16)))
    for depth in depths:
        y = horizon + (HEIGHT - horizon) * depth
        s = 6 + 34 * depth  # pixels per metre and a half
        left, right = road(y)
        kind = rng.choice(
            ["car", "bus", "rider", "person", "tree", "pole"], p=[0.27, 0.1, 0.11, 0.2, 0.16, 0.16]
        )
        if kind in ("car", "bus", "rider"):
            x = rng.uniform(left, right)
        else:
            edge, side = (left, -s) if rng.random() < 0.5 else (right, s)
            x = edge + side * rng.uniform(0.2, 1.2)
        if kind == "tree":
            tree(c, x, y, s * rng.uniform(1.4, 2.4))
        elif kind == "car":
            car(c, x, y, s * rng.uniform(1.0, 1.3))
        elif kind == "bus":
            bus(c, x, y, s * rng.uniform(1.0, 1.4))
        elif kind == "pole":
            pole(c, x, y, s)
        else:
            figure(c, x, y, s * rng.uniform(0.75, 1.0), PERSON if kind == "person" else RIDER)


def draw(index):
    """Scene number `index`: image (96, 160, 3) and label (96, 160), uint8."""
    rng = np.random.default_rng([2202, 13393, index])
    c = Canvas(rng)
    horizon = int(HEIGHT * rng.uniform(0.35, 0.5))
    background(c, horizon)
    things(c, horizon, ground(c, horizon))
    if rng.random() < 0.6:  # the bonnet of our own car, not to be labelled
        bonnet = (20, HEIGHT - 7, WIDTH - 20, HEIGHT + 30)
        c.shape("ellipse", bonnet, c.colour((60, 62, 66), 20), VOID)
    return weather(c.image, rng), np.asarray(c.label)


def weather(image, rng):
    """Haze, the light and colour of the day, lens blur, sensor noise."""
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
    x = np.asarray(image, np.float32)
    haze = rng.uniform(0, 0.35)
    x = x * (1 - haze) + 190 * haze
    x = (x - 128) * rng.uniform(0.7, 1.15) + 128 * rng.uniform(0.65, 1.2)
    x = x * rng.uniform(0.9, 1.1, 3) + rng.normal(0, rng.uniform(3, 10), x.shape)
    return np.clip(x, 0, 255).astype(np.uint8)
