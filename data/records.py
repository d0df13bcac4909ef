"""Conversations, edits and interleaved documents from JSON files, of any size: only where each record is stays in memory.

    chats.json      LLaVA's list (or one record a line, .jsonl): {"image": "a.jpg", or a list of paths, or nothing, "conversations":
                    [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}, ...]}. <image> is where a
                    picture stands; "user" and "assistant" are heard too. The replies are learned.
    documents.jsonl one list a line, of {"text": words} and {"image": path}, in reading order. "paint": true: a picture to learn to paint;
                    "loss": false: what is not to be learned (a picture that is only read has no loss).
                    An edit is told by its shape: pictures that are read, one text with "loss": false, one picture to paint:
                    [{"image": "a.png"}, {"text": "make it blue", "loss": false}, {"image": "b.png", "paint": true}]

    records = Records([("chats.json", conversation), ("documents.jsonl", document)])
    kind, parts = records[7]        # ("question", [([Image("a.jpg"), "What is this?"], ["A cat."])]), or a ValueError says what is wrong
"""
import io
import json
import mmap
import os
import re
from typing import NamedTuple

import numpy as np

TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[]["{},]', re.DOTALL)      # of JSON, those by which its outermost list falls into records
SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


class Text(NamedTuple):
    words: str
    loss: bool = True


class Image(NamedTuple):
    path: str
    paint: bool = False
    loss: bool = True


class Records:
    """Record i of several files, read when it is asked for: `parse(record, folder)`. folder: of the images, if not each file's own."""

    def __init__(self, sources: list, folder: str = ""):
        """sources: (path, `conversation` or `document`). Raises ValueError for a file that cannot be read."""
        self.sources, self.folder, spans = sources, folder, [np.zeros((0, 3), np.int64)]
        for number, (path, parse) in enumerate(sources):
            try:
                spans.append(np.array([(number, *span) for span in _spans(path, parse is document)], np.int64).reshape(-1, 3))
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} cannot be read as records ({error}); expected one a line, or conversations as a list") from None
        self.spans = np.concatenate(spans)                              # (records, 3): file, first byte, bytes

    def __len__(self):
        return len(self.spans)

    def name(self, i: int) -> str:
        number = self.spans[i, 0]
        return f"{self.sources[number][0]}, record {i - np.searchsorted(self.spans[:, 0], number) + 1}"

    def __getitem__(self, i: int) -> tuple[str, list]:
        """-> kind, parts. Raises ValueError with what is wrong with it."""
        number, start, size = self.spans[i].tolist()
        path, parse = self.sources[number]
        with open(path, "rb") as file:                                  # opened anew: workers would share its position
            file.seek(start)
            line = file.read(size)
        try:
            return parse(json.loads(line), self.folder or os.path.dirname(path))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None


def _spans(path: str, lists: bool):
    """File -> (first byte, bytes) of each record: its lines, or, where it begins with [ and lines are no lists, that list's items."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else io.BytesIO() as data:
        if lists or isinstance(data, io.BytesIO) or not re.match(rb"(?:\xef\xbb\xbf)?\s*\[", data):
            for line in file:
                if line.strip():
                    yield file.tell() - len(line), len(line)
            return
        depth = begin = 0
        for token in TOKENS.finditer(data):
            mark = token[0]
            if mark == b'"':        # each later one would be sought to the end of the file
                raise ValueError(f"its string at byte {token.start():,} has no end")
            if depth == 1 and mark in (b",", b"]"):
                if data[begin:token.start()].strip():
                    yield begin, token.start() - begin
                begin = token.end()
            if mark in (b"[", b"{"):
                depth += 1
                begin = begin or token.end()
            elif mark in (b"]", b"}"):
                depth -= 1
        if depth:
            raise ValueError("its list has no end")


def _check(right: bool, what: str):
    if not right:
        raise ValueError(what)


def conversation(record, folder: str) -> tuple[str, list]:
    """LLaVA's record -> "question", [(asked, reply), ...], of strings and `Image`s. Raises ValueError."""
    _check(isinstance(record, dict), f"expected an object, got {str(record)[:40]!r}")
    images, turns = record.get("image"), record.get("conversations")
    images = [] if images is None else images if isinstance(images, list) else [images]
    _check(all(isinstance(path, str) for path in images), f'"image" is {str(images)[:40]}, expected a path or a list of paths')
    _check(isinstance(turns, list) and all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns),
           '"conversations" is no list of {"from": ..., "value": words}')
    for t in turns:
        _check(t.get("from") in [*SPEAKERS], f"unknown speaker {str(t.get('from'))[:40]!r}, expected {', '.join(SPEAKERS)}")
    _check([SPEAKERS[t["from"]] for t in turns] == [0, 1] * (len(turns) // 2), "its speakers do not take turns, question and reply")
    marks = sum(t["value"].count("<image>") for t in turns)
    _check(marks == len(images), f"{marks} <image> marks for {len(images)} images")
    _check(not any("<image>" in t["value"] for t in turns[1::2]), "a reply has an <image>")
    _check(any(t["value"].strip() for t in turns[1::2]), "no reply, so nothing with a loss")
    paths, exchanges = iter(images), []
    for question, reply in zip(turns[::2], turns[1::2]):
        # the line break after a picture is the files' habit; ours have none
        words = [part.strip() for part in question["value"].split("<image>")]
        asked = [words[0]] + [item for part in words[1:] for item in (Image(os.path.join(folder, next(paths))), part)]
        exchanges.append(([item for item in asked if item], [reply["value"].strip()]))
    return "question", exchanges


def document(record, folder: str) -> tuple[str, list]:
    """A list of texts and pictures -> "document" or "edit", [`Text` or `Image`, ...]. Raises ValueError."""
    _check(isinstance(record, list), f"expected a list, got {str(record)[:40]!r}")
    parts = []
    for part in record:
        _check(isinstance(part, dict) and ("text" in part) != ("image" in part),
               f'{str(part)[:40]!r} is neither {{"text": words}} nor {{"image": path}}')
        _check(not set(part) - {"text", "image", "loss", "paint"},
               f'{str(part)[:60]!r} has other names than "text" or "image", "loss" and "paint"')
        for flag in ("loss", "paint"):
            _check(isinstance(part.get(flag, True), bool), f'"{flag}" is {str(part.get(flag))[:40]!r}, expected true or false')
        _check("image" in part or not part.get("paint"), f'{str(part)[:40]!r}: "paint" is of pictures')
        words, path, loss = part.get("text"), part.get("image"), part.get("loss", True)
        _check(isinstance(words if "text" in part else path, str), f"{str(part)[:40]!r} is neither words nor a path")
        parts.append(Text(words, loss) if "text" in part else Image(os.path.join(folder, path), part.get("paint", False), loss))
    _check(learned(parts), "nothing in it has a loss")
    painted = [getattr(part, "paint", None) for part in parts]         # None: words
    edit = len(parts) > 2 and not parts[-2].loss and painted == [False] * (len(parts) - 2) + [None, True]
    return "edit" if edit else "document", parts


def learned(parts: list) -> bool:
    """Whether there is anything to learn in a document."""
    return any(part.loss and (part.words.strip() if isinstance(part, Text) else part.paint) for part in parts)
