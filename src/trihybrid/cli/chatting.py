"""`trihybrid chat`: a conversation in the terminal."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trihybrid.cli.frame import WeightsName, app, complain, console

if TYPE_CHECKING:
    from trihybrid.infer.chat import Chat
    from trihybrid.infer.session import Identity

HELP = (
    "/save FILE  write the conversation's state    /load FILE  go on with one\n"
    "/stats      tokens, bytes and speed           /reset      begin anew    /quit  leave"
)


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="Folder of a teacher or student with its tokenizer.")],
    tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token every time.", min=0.0)
    ] = 0.7,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 for all.", min=0)] = 50,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens up to this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    system: Annotated[str, typer.Option(help="What the conversation begins with.")] = "",
    weights: WeightsName = "full",
) -> None:
    """Talk with a model. Without a chat template in its folder, what you write and what it writes is one text.

    `/save FILE`, `/load FILE`, `/stats`, `/reset` and `/quit` are commands; Ctrl-C breaks an answer off.
    """
    from trihybrid.data.tokens import Tokenizer
    from trihybrid.infer.chat import Chat, end_tokens
    from trihybrid.infer.chat_prompt import ChatPrompt, has_chat_template
    from trihybrid.infer.engine import Engine
    from trihybrid.infer.sampling import Sampling
    from trihybrid.infer.session import identity
    from trihybrid.models.checkpoint import load_model

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    loaded, tokenizer = load_model(model), Tokenizer.from_file(model)
    prompt = ChatPrompt(model) if has_chat_template(model) else None
    ends = end_tokens(loaded, tokenizer)
    engine = Engine(loaded, weights=weights)
    talk = Chat(engine, tokenizer, prompt, ends, tokens, sampling, system)
    made_by = identity(model, tokenizer)
    console.print(HELP, markup=False, highlight=False)
    if prompt is None:
        console.print("no chat template in the folder: the model goes on with what you write", soft_wrap=True)
    while True:
        sys.stdout.write("> ")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            _answer(talk, line.rstrip("\n"), made_by)


def _answer(talk: "Chat", line: str, made_by: "Identity") -> None:
    """Answer a line, or obey it; errors of the user become one line, and the conversation goes on."""
    command, _, argument = line.strip().partition(" ")
    try:
        if command == "/save":
            path = _path(argument)
            console.print(
                f"a state of {len(talk.tokens):,} tokens: {talk.state_bytes:,} bytes", soft_wrap=True
            )
            console.print(f"{path}: {talk.save(path, made_by):,} bytes", soft_wrap=True)
        elif command == "/load":
            talk.load(_path(argument), made_by)
            console.print(f"{len(talk.messages)} messages, {len(talk.tokens):,} tokens", soft_wrap=True)
        elif command == "/stats":
            console.print(_stats(talk), soft_wrap=True)
        elif command == "/reset":
            talk.reset()
        elif command.startswith("/"):
            raise ValueError(f"{command} is no command; there are /save, /load, /stats, /reset and /quit")
        else:
            _speak(talk, line)
    except (ValueError, OSError) as error:
        complain(f"error: {error}")


def _speak(talk: "Chat", line: str) -> None:
    """Write the answer as it comes. Ctrl-C ends it behind a whole step, so that the state stays that of the tokens."""
    before = signal.signal(signal.SIGINT, lambda number, frame: talk.interrupt())
    try:
        for piece in talk.say(line):
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        signal.signal(signal.SIGINT, before)
    sys.stdout.write("\n")


def _path(argument: str) -> Path:
    if not argument.strip():
        raise ValueError("name a file, as /save talk.session")
    return Path(argument.strip())


def _stats(talk: "Chat") -> str:
    speed = talk.speed
    lines = [
        f"{len(talk.messages)} messages, {len(talk.tokens):,} tokens, a state of {talk.state_bytes:,} bytes"
    ]
    if speed.chosen:
        reading = speed.read / max(speed.reading, 1e-9)
        lines.append(f"read {speed.read:,} tokens at {reading:,.0f} tokens/s")
    if speed.chosen > 1:
        choosing = (speed.chosen - 1) / max(speed.choosing, 1e-9)
        lines.append(f"wrote {speed.chosen:,} tokens at {choosing:,.1f} tokens/s")
    return "\n".join(lines)
