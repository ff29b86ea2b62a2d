"""Maps of route tasks as pictures, and the questions that need the map, the table, or both."""

import io
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any


MODES = ("map", "table", "both")
"""What a question is asked with."""

_COLOURS = {
    "Amber": "#ffbf00", "Azure": "#1e90ff", "Coral": "#ff7f50", "Ivory": "#b8b08a", "Jade": "#00a86b", "Onyx": "#353839",
    "Pearl": "#a9a9b8", "Ruby": "#c1121f", "Saffron": "#f4a000", "Slate": "#708090", "Teal": "#008080", "Violet": "#8f00ff",
}  # fmt: skip
_FONT, _ROW = 14, 18  # pixels


def draw_map(lines: Mapping[str, Sequence[str]], seed: str) -> bytes:
    """
    A PNG: stops with their names, lines in colours, and a legend.

    The stops lie on a circle, in an order of the seed's, each with a height of its own on its side, for its name. Rides bend
    inwards, past the stops that are not their own.
    """
    # Pillow comes with the extra `vision`.
    from PIL import Image, ImageDraw, ImageFont

    stops = sorted({stop for line in lines.values() for stop in line})
    random.Random(seed).shuffle(stops)
    height = -(-len(stops) // 2)  # of a side, in stops
    radius = max(110, height * _ROW // 2)
    middle = radius + 90
    picture = Image.new("RGB", (2 * middle, 2 * middle + _ROW * len(lines) + 10), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
    places = {}
    for number, stop in enumerate(stops):
        y = radius * ((2 * (number // 2) + 1) / height - 1)
        x = math.sqrt(radius**2 - y**2) * (1 if number % 2 else -1)
        places[stop] = (middle + x, middle + y)
    for number, (name, line) in enumerate(lines.items()):
        for stop, other in itertools.pairwise(line):
            draw.line(_bent(places[stop], places[other], middle), fill=_COLOURS[name], width=4)
        top = 2 * middle + _ROW * number
        draw.line([(20, top + 8), (60, top + 8)], fill=_COLOURS[name], width=4)
        draw.text((70, top), f"{name} line", fill="black", font=font)
    for stop, (x, y) in places.items():
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill="white", outline="black", width=2)
        left = x < middle
        draw.text((x + (-9 if left else 9), y), stop, fill="black", font=font, anchor="rm" if left else "lm")
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _bent(start: Sequence[float], end: Sequence[float], middle: float, points: int = 24) -> list[tuple[float, float]]:
    """A quadratic curve whose control lies between the middle of the ride and that of the circle."""
    control = [0.65 * (a + b) / 2 + 0.35 * middle for a, b in zip(start, end, strict=True)]

    def at(t: float, axis: int) -> float:
        return (1 - t) ** 2 * start[axis] + 2 * t * (1 - t) * control[axis] + t**2 * end[axis]

    return [(at(number / points, 0), at(number / points, 1)) for number in range(points + 1)]


def rides_alike(tables: dict[str, Any]) -> dict[str, Any]:
    """Tables by which a route costs one for each ride, under a weight of one on time."""
    edges = [{"Edge": edge["Edge"], "Line": edge["Line"], "Time": "3"} for edge in tables["edges"]]
    vertices = [{"Vertex": vertex["Vertex"], "Time": "0", "Transfer Time": "0"} for vertex in tables["vertices"]]
    return {**tables, "edges": edges, "vertices": vertices}
