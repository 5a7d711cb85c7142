"""What self-written calibration text begins with: neutral openers by kind, and requests for chat models."""

from __future__ import annotations

import numpy as np

OPENERS: dict[str, tuple[str, ...]] = {
    "prose": (
        "The old harbour had changed very little since",
        "Most people believe that memory works like a",
        "In the spring of that year, the company decided to",
        "There are two reasons why a bridge can fail. The first",
        "She closed the door, put down her bag and",
        "Abstract. We study the problem of",
        "The committee met on Tuesday to discuss",
        "When I was young, my grandfather used to say that",
    ),
    "code": (
        '"""Utilities for reading and writing tables."""\n\nfrom __future__ import annotations\n\nimport os\n',
        "class Node:\n    def __init__(self, value, left=None, right=None):\n",
        "def test_parse_returns_all_fields(tmp_path):\n    ",
        "#include <stdio.h>\n#include <stdlib.h>\n\nstatic int compare(const void *a, const void *b) {\n",
        "function fetchItems(url, options = {}) {\n  ",
        "#!/bin/sh\nset -eu\n\n# Install what the build needs\n",
        "SELECT c.name, COUNT(o.id) AS orders\nFROM customers c\n",
        "import argparse\nimport logging\nimport sys\n\nlogger = logging.getLogger(__name__)\n\n\ndef main():\n",
    ),
    "documents": (
        "# Configuration\n\nAll options can be set in a file or on the command line.\n\n## Options\n\n",
        "## Installation\n\n```bash\n",
        "### Usage\n\n| Option | Default | Description |\n|---|---|---|\n",
        "# Changelog\n\n## 2.4.0\n\n### Added\n\n- ",
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n  <title>',
        '{\n  "name": "example",\n  "version": "1.0.0",\n  "description": "',
        ".. function:: open(path, mode='r')\n\n   Open a file and return",
        "[2024-03-02 10:15:31] INFO  server: listening on port 8080\n[2024-03-02 10:15:32] ",
    ),
    "lists": (
        "Ingredients:\n\n- 200 g flour\n- ",
        "Ten facts about the oceans:\n\n1. ",
        "Agenda\n\n1. Welcome\n2. ",
        "Things to check before a long journey:\n* ",
        "Chapter 1: The Beginning\nChapter 2: ",
        "Name,City,Year,Amount\nAnna,Lisbon,2011,250\n",
    ),
    "dialogue": (
        '"Where have you been?" she asked.\n\n"',
        "INTERVIEWER: Thank you for coming. How did you get started?\n\nGUEST: ",
        "User: My printer does not print any more. What can I do?\nSupport: ",
        "ROMAN (quietly). And what if nobody comes?\nELENA. ",
        "Dear Mr Harris,\n\nThank you for your letter of",
        "Q: What is the difference between weather and climate?\nA: ",
    ),
    "languages": (
        "Il était une fois, dans un petit village,",
        "Die Stadt liegt an einem Fluss und",
        "El sistema consta de tres partes:",
        "La storia di questa città comincia",
        "Это было ранним утром, когда",
        "人工智能的发展",
        "昔々あるところに、",
        "كان هناك رجل",
        "यह एक छोटा सा गाँव",
    ),
    "maths": (
        "Theorem 1. Let $f$ be a continuous function on $[a, b]$. Then",
        "Problem: A train leaves the station at 9:15 and travels at 80 km/h.\n\nSolution:",
        "To solve the equation x^2 - 5x + 6 = 0, we first",
        "12 + 7 = 19\n8 * 6 = 48\n144 / 12 =",
        "The probability that a fair die shows a six twice in a row is",
        "\\begin{equation}\n",
    ),
}

FORMS = (
    "Write a short story about {topic}.",
    "Explain {topic} to a beginner.",
    "Write a detailed essay about {topic}.",
    "Make a list of ten interesting facts about {topic}.",
    "Write a Python program about {topic}, with comments and tests.",
    "Write a Python class that models {topic}.",
    "Write the README of a software project about {topic}, in Markdown.",
    "Write the reference documentation of a command-line tool for {topic}, with a table of its options.",
    "Write a dialogue between two people who disagree about {topic}.",
    "What are the advantages and disadvantages of {topic}?",
    "Summarize what is known about {topic}.",
    "Write a formal letter that asks for information about {topic}.",
    "Give step-by-step instructions on {topic}.",
    "Write a JSON document that describes {topic}.",
    "Invent a maths problem about {topic} and solve it.",
    "Write a poem about {topic}.",
    "Écris un texte sur {topic}.",
    "Schreibe einen kurzen Text über {topic}.",
)

TOPICS = (
    "the history of printing", "sorting and searching", "sourdough bread", "a lighthouse keeper", "electric cars",
    "file systems", "the water cycle", "a lost letter", "learning a language", "network protocols", "bees",
    "medieval towns", "parsing text", "photography", "a journey by train", "vaccines", "matrix multiplication",
    "growing tomatoes", "the moons of Jupiter", "unit testing", "a family reunion", "public libraries", "chess",
    "time zones", "earthquakes", "a small bookshop", "databases", "city planning", "jazz music", "recycling",
    "a software start-up", "rivers", "encryption", "migration of birds", "household budgets", "a chess tournament",
    "image formats", "the Roman empire", "running a marathon", "solar power", "weather forecasts", "trees and graphs",
)  # fmt: skip


def request(rng: np.random.Generator) -> str:
    """A request to a chat model, put together at random."""
    form = FORMS[int(rng.integers(len(FORMS)))]
    return form.format(topic=TOPICS[int(rng.integers(len(TOPICS)))])
