"""``xkv-gguf chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.files import check_writable, read_text
from ..base.text import clean_text
from ..errors import OptionError, XkvError
from ._answer import Answer, add_model_arguments, answer_chat, open_llama, sampling, write
from ._saved import Session

if TYPE_CHECKING:
    from ..llama import Llama

COMMANDS = """\
/file PATH  put a text file in front of the next message
/stats      tokens, speed and the cache's memory
/reset      forget the conversation
/help       this list
/exit       leave (also Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Chat:
    """A conversation with its pending file."""

    llm: Llama
    args: argparse.Namespace
    messages: list[dict[str, str]] = field(default_factory=list)
    attached: str | None = None
    last: Answer | None = None
    session: Session | None = None

    def resume(self) -> bool:
        """Take the conversation of the session's file up again; False where there is none yet.

        Raises
        ------
        StateError
            The file cannot be used.
        OptionError
            The conversation has another system message than the one that is given.
        """
        messages = self.session.load() if self.session else None
        if messages is None:
            return False
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        if self.args.system and clean_text(self.args.system) != system:
            raise OptionError(f"--system: the session {self.args.session} has another one; leave it out")
        self.messages = messages
        return True

    def start(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": clean_text(self.args.system)}] if self.args.system else []
        self.attached = None
        self.last = None

    def say(self, text: str) -> None:
        """Send a message and print the answer. A message that fails is taken back."""
        content = text if self.attached is None else f"{self.attached}\n\n{text}"
        self.messages.append({"role": "user", "content": content})
        try:
            answer = answer_chat(self.llm, self.messages, sampling(self.args, self.args.max_tokens), write)
        except XkvError as error:
            self.messages.pop()
            print(f"{error} (/reset forgets the conversation)")
            return
        print()
        self.attached = None
        self.last = answer
        self.messages.append({"role": "assistant", "content": answer.text})
        if self.session:
            self.session.save(self.messages)  # now: a terminal that is closed loses nothing
        if answer.finish_reason == "length" and self.llm.n_tokens >= self.llm.n_ctx() - 1:
            print(f"[the context of {self.llm.n_ctx()} tokens is full: /reset, or start with a larger --n-ctx]")

    def attach(self, path: str) -> None:
        """Read a file for the next message."""
        text = read_text(path).strip()
        n_tokens = len(self.llm.tokenize(text.encode(), add_bos=False))
        if n_tokens >= self.llm.n_ctx():
            print(f"{path}: {n_tokens} tokens do not fit, n_ctx is {self.llm.n_ctx()}: start with a larger --n-ctx")
            return
        self.attached = text
        print(f"{path}: {n_tokens} tokens; now ask about it")

    def stats(self) -> None:
        """Print what the conversation and the cache take."""
        if self.last is not None:
            print(self.last)
        print(f"{self.llm.n_tokens} of {self.llm.n_ctx()} tokens in use")
        print(self.llm.kv_report())

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; False for /exit."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/reset":
            self.start()
            if self.session:
                self.llm.reset()
                self.llm.eval([])
                self.session.save(self.messages)
            print("the conversation is forgotten")
        elif name == "/stats":
            self.stats()
        elif name == "/file" and rest:
            self.attach(rest)
        elif name == "/file":
            print("/file: which one? /file PATH")
        else:
            if name != "/help":
                print(f"{name} is unknown")
            print(COMMANDS)
        return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "-n", "--max-tokens", type=int, metavar="N", help="longest answer in tokens (default: no limit)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the model's own)")
    parser.add_argument(
        "--session",
        metavar="FILE",
        help="take up the conversation of this file, if there is one, and write it there after every answer",
    )
    add_model_arguments(parser, temp=0.7)


def run(args: argparse.Namespace) -> int:
    """Chat until /exit or the end of input."""
    if args.max_tokens is not None and args.max_tokens < 1:
        raise OptionError(f"-n: {args.max_tokens}, expected 1 or more")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    if args.session is not None:
        check_writable(Path(args.session))
    llm = open_llama(args)
    try:
        chat = Chat(llm, args, session=None if args.session is None else Session(llm, Path(args.session)))
        resumed = chat.resume()
        if not resumed:
            chat.start()
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{llm.kv_report()}\n/help lists the commands")
        if interactive and resumed:
            print(f"[{args.session}: {len(chat.messages)} messages, {llm.n_tokens} tokens]")
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print()
                continue
            try:
                if line.startswith("/"):
                    if not chat.command(line):
                        return 0
                elif line:
                    chat.say(line)
            except XkvError as error:
                print(error)
    finally:
        llm.close()
