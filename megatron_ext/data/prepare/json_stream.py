"""Reads the values of a JSON file one by one, however long it is: the elements of an array, or values in a row."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

_BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


class NotJson(Exception):
    """The file is not JSON from `line` on; `why` says it in words."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line, self.why = line, why


def why_not_json(error: ValueError | RecursionError) -> str:
    """What Python's parser means, in words for the owner of the file."""
    if isinstance(error, RecursionError):
        return "not JSON that can be read (nested too deeply)"
    if not isinstance(error, json.JSONDecodeError):
        return "not JSON that can be read (a number of more than 4300 digits)"
    return f"not JSON ({error})"


def too_long(longest: int) -> str:
    """What is wrong with a document of more than `longest` bytes."""
    return f"a document longer than {longest >> 20} MiB; cut it into several"


def json_values(file: IO[bytes], longest: int) -> Iterator[tuple[int, Any]]:
    """Yield (number of the line it begins in, value) of the elements of an array or of values that follow each other.

    Args:
        longest: bytes of the longest value.

    Raises:
        NotJson: not JSON, not UTF-8 or a longer value.
    """
    text = _Text(file, longest)
    is_array = text.peek() == "["
    if is_array:
        text.take(1)
    is_first = True
    while (character := text.peek()) != "":
        if is_array and character == "]":
            text.take(1)
            if text.peek():
                raise NotJson(text.line, "not JSON (text after the end of the array)")
            return
        if is_array and not is_first:
            if character != ",":
                raise NotJson(text.line, "not JSON (expected ',' or ']' after an element of the array)")
            text.take(1)
            text.peek()
        is_first = False
        yield text.line, text.value()
    if is_array:
        raise NotJson(text.line, "not JSON (the array does not end: the file is cut)")


class _Text:
    """The text of a file from the present position on, as much of it as a value needs."""

    def __init__(self, file: IO[bytes], longest: int) -> None:
        self._file, self._longest = file, longest
        self._text, self._at, self._ended = "", 0, False
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self.line = 1

    def peek(self) -> str:
        """The next character that is no space, or "" at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self.take(match.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, count: int) -> None:
        """Go on by `count` characters."""
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                # A number may go on behind what was read.
                if isinstance(value, dict) or end < len(self._text) or not self._more():
                    self.take(end - self._at)
                    return value
            except json.JSONDecodeError as error:
                # Only what breaks off can become JSON by reading on.
                breaks_off = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if not (breaks_off and self._more()):
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    raise NotJson(line, f"not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise NotJson(self.line, why_not_json(error)) from error

    def _more(self) -> bool:
        """Read on, as much as is held already, so that a long value is not parsed too often; False at the end."""
        held = len(self._text) - self._at
        if held > self._longest:
            raise NotJson(self.line, too_long(self._longest))
        if self._ended:
            return False
        block = self._file.read(max(_BLOCK, held))
        self._ended = not block
        try:
            self._text = self._text[self._at :] + self._utf8.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            guess = ", by its first bytes UTF-16" if self.line == 1 and block[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise NotJson(self.line, f"not UTF-8{guess} ({error.reason}); convert it with iconv") from error
        self._at = 0
        return True
