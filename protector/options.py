"""Configurations as frozen dataclasses, each field a flag of the command line."""
import argparse
import dataclasses
import typing
from dataclasses import field
from pathlib import Path


def option(default, help):
    """A field with its help text."""
    return field(default=default, metadata={"help": help})


def add_options(parser, config):
    """One flag for each field of a frozen dataclass; its default is visible in --help."""
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        hint, required = hints[item.name], item.default is dataclasses.MISSING
        many = typing.get_origin(hint) is tuple
        options = {"help": item.metadata.get("help", ""), "type": typing.get_args(hint)[0] if many else hint}
        if hint is bool:
            options = {"help": options["help"], "action": argparse.BooleanOptionalAction}
        if many:
            options["nargs"] = "*" if not required else "+"
        if required or item.metadata.get("positional"):
            parser.add_argument(item.name, **options)
            continue
        options["help"] += f" (default: {' '.join(map(str, item.default)) if many else item.default!r})"
        parser.add_argument("--" + item.name.replace("_", "-"), default=item.default, **options)


def config_from(arguments, config):
    """The configuration that these parsed arguments give."""
    values = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(config)}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def protector_from(config):
    """Protector of a configuration with GuardConfig's fields; -1 and 0 stand for nothing given."""
    from .guard import Protector

    options = {"n_threads": config.threads or None}
    is_file = not Path(config.detector or ".").is_dir() or not config.detector
    return Protector(
        detector=config.detector or None, detoxifier=config.detoxifier or None,
        threshold=None if config.threshold < 0 else config.threshold, fpr=None if config.fpr < 0 else config.fpr,
        on_flag=config.on_flag, on_error=config.on_error, deadline_ms=config.deadline_ms or None,
        detector_options=options | {"quantisation": config.quantisation} if is_file else {}, detoxifier_options=options)
