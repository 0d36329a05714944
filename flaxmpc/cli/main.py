"""The command line: which commands there are, and what is said of an error."""

import importlib
import platform
import sys
from importlib import metadata

import tyro

import flaxmpc
from flaxmpc.errors import unknown

_DESCRIPTION = """Transformers that classify what they cannot see: Flax under secure MPC.

flaxmpc --version names the versions."""


def _versions() -> str:
    found = {"flaxmpc": flaxmpc.__version__, **{name: metadata.version(name) for name in ("spu", "jax")}}
    return ", ".join(f"{name} {version}" for name, version in {**found, "Python": platform.python_version()}.items())


# The module of `flaxmpc.cli` that has a command's function, which is named like the command. Only the one that is
# wanted is imported: a party need not wait for what training takes.
_COMMANDS = {
    "infer": "infer",
    "cost": "infer",
    "check": "infer",
    "plan": "infer",
    "zoo": "zoo",
    "finetune": "convert",
    "convert": "convert",
    "cluster": "deploy",
    "party": "deploy",
    "put": "deploy",
    "approve": "deploy",
}


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. What the user can mend is one line on standard error, and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(_versions())
        return
    from flaxmpc.secure import SecureError

    try:
        _app(arguments).cli(prog="flaxmpc", description=_DESCRIPTION, args=arguments)
    except BrokenPipeError:  # the reader of the output has seen enough
        raise
    except (ValueError, OSError, FloatingPointError, SecureError) as error:
        message = " ".join(str(error).split())
        # What a terminal would obey is shown: parts of a message may be of a file, or of a party.
        print("flaxmpc:", "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message), file=sys.stderr)
        raise SystemExit(2) from error


def _app(arguments: list[str]) -> tyro.extras.SubcommandApp:
    """The command that the arguments begin with; all, where they begin with none."""
    named = [word for word in arguments[:1] if not word.startswith("-")]
    for name in named:
        if name not in _COMMANDS:
            raise unknown("command", name, _COMMANDS)
    app = tyro.extras.SubcommandApp()
    for name in named or _COMMANDS:
        app.command(getattr(importlib.import_module(f"flaxmpc.cli.{_COMMANDS[name]}"), name), name=name)
    return app
