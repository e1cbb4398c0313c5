"""Reads the SVG of a chart."""

import itertools
import re
import xml.etree.ElementTree

import numpy as np

NUMBER = r"-?[\d.]+"


class Drawn:
    """The parts of a chart's SVG.

    Attributes:
      tips: title -> what is drawn of that thing.
      x, y: labels of ticks -> their places, in the picture's units; y by the lines of the grid.
    """

    def __init__(self, svg: str):
        self.root = xml.etree.ElementTree.fromstring(svg)
        self.texts = [node.text for node in self.root.iter("text")]
        groups = self.root.findall("g")
        self.tips = {g.find("title").text: [n for n in g if n.tag != "title"] for g in groups}
        assert len(self.tips) == len(groups)
        self.x, self.y = {}, {}
        for before, node in itertools.pairwise([self.root, *self.root]):
            if node.tag != "text" or not re.fullmatch(r"[\d.,]+[kM%]?", node.text):
                continue
            if node.get("text-anchor") == "middle":
                self.x[node.text] = float(node.get("x"))
            elif before.tag == "path":
                self.y[node.text] = box(before)[1]


def box(node) -> tuple[float, float, float, float]:
    """The ends of a path: left, upper, right, lower."""
    points = np.reshape([float(n) for n in re.findall(NUMBER, node.get("d"))], (-1, 2))
    moved = [float(n) for n in re.findall(NUMBER, node.get("transform", "0 0"))]
    low, high = points.min(0) + moved, points.max(0) + moved
    return *low, *high


def middle(node) -> tuple[float, float]:
    left, upper, right, lower = box(node)
    return (left + right) / 2, (upper + lower) / 2
