"""Commands that answer others: serve."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from trihybrid.cli.frame import WeightsName, app, console, errors


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="Folder of a teacher or student with its tokenizer.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name by which requests call it; the folder's if not given.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients of /v1 must send.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Requests that are worked on together.", min=1, max=4096)] = 8,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait; more get 429.", min=0, max=100_000)
    ] = 64,
    context: Annotated[
        int, typer.Option(help="Most tokens of a prompt and its answer together.", min=2)
    ] = 8192,
    new_tokens: Annotated[
        int, typer.Option(help="Longest answer where a request does not say.", min=1)
    ] = 1024,
    seconds: Annotated[
        float, typer.Option(help="Time from a request's arrival to its last token.", min=0.001)
    ] = 600,
    grace: Annotated[
        float, typer.Option(help="Seconds that running requests have at the end.", min=0, max=86_400)
    ] = 30,
    chunk: Annotated[
        int, typer.Option(help="Most tokens of prompts between two steps of the others.", min=1)
    ] = 512,
    prefix_mib: Annotated[
        float,
        typer.Option(help="MiB of states kept for prompts that begin alike; 0 for none.", min=0, max=1e9),
    ] = 1024,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    execution: Annotated[
        str, typer.Option(help="How a step runs: eager, compiled (CPU), graph, fused-graph or kernels (GPU).")
    ] = "eager",
    weights: WeightsName = "full",
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of torch on the CPU; 1 is best for small models.", min=1, max=1024),
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients: chat, completions, streams; /health and /metrics.

    SIGTERM and Ctrl-C end it: what waits is refused, what runs may finish.
    """
    missing = [part for part in ("starlette", "uvicorn", "prometheus_client") if find_spec(part) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'trihybrid[serving]'")
    import torch

    from trihybrid.infer.server.limits import Limits
    from trihybrid.infer.server.process import bind, is_loopback
    from trihybrid.infer.server.start import open_server

    if threads is not None:
        torch.set_num_threads(threads)
    limits = Limits(
        rows=rows, queue=queue, context=context, new_tokens=new_tokens, seconds=seconds, prefix_mib=prefix_mib
    )
    key = None if api_key_file is None else _key(api_key_file)
    if key is None and not is_loopback(host):
        errors.print(f"warning: {host} without --api-key-file: whoever reaches it may use it", markup=False)
    with (
        bind(host, port) as listening,
        open_server(
            model,
            name or model.resolve().name,
            limits,
            key,
            grace,
            chunk,
            device,
            execution,  # type: ignore[arg-type]
            weights,
        ) as server,
    ):
        address = f"[{host}]" if ":" in host else host
        console.print(f"{model}: http://{address}:{listening.getsockname()[1]}/v1", soft_wrap=True)
        server.run(sockets=[listening])


def _key(file: Path) -> str:
    key = file.read_text(encoding="utf-8").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"{file}: no key; it must be one line of printable ASCII")
    return key
