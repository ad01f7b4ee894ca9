"""Configurations as frozen dataclasses, each field a flag of the command line."""
import argparse
import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path


def option(default, help):
    """A field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which models, on what, and at which threshold: the options that every command with a guard has."""

    detector: str = option("", "GGUF file or PyTorch folder; the shipped one if empty")
    detoxifier: str = option("", "GGUF file or PyTorch folder; the shipped one if empty")
    quantisation: str = option("F16", "of the detector's base: F32, F16, BF16, Q8_0, Q4_0, base; INT8 = in PyTorch")
    threshold: float = option(-1.0, "flag at this score; -1 = the model's calibration")
    fpr: float = option(-1.0, "use the calibration for this false-positive rate; -1 = the default one")
    threads: int = option(0, "CPU threads; 0 = all cores that this process may use")

    @property
    def scoring(self):
        """threshold, fpr and detector_options of a Protector; -1 and 0 stand for nothing given."""
        is_folder = self.detector and Path(self.detector).is_dir()
        of_file = {} if is_folder and self.quantisation != "INT8" else {"quantisation": self.quantisation}
        return {"threshold": None if self.threshold < 0 else self.threshold, "fpr": None if self.fpr < 0 else self.fpr,
                "detector_options": {**of_file, "n_threads": self.threads or None}}


def add_options(parser, config):
    """One flag for each field of a frozen dataclass; its default is visible in --help."""
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        hint, required = hints[item.name], item.default is dataclasses.MISSING
        many = typing.get_origin(hint) is tuple
        options = {"help": item.metadata.get("help", "").replace("%", "%%"), "type": typing.get_args(hint)[0] if many else hint}
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


def parsed(config, prog, description, argv=None):
    """The configuration that a module's own command line gives; the description is its docstring, as it stands."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, config)
    return config_from(parser.parse_args(argv), config)


def protector_from(config):
    """Protector of ModelOptions with on_flag, on_error and deadline_ms beside them; a deadline of 0 is none."""
    from .guard import Protector

    return Protector(config.detector or None, config.detoxifier or None, on_flag=config.on_flag, on_error=config.on_error,
                     deadline_ms=config.deadline_ms or None, detoxifier_options={"n_threads": config.threads or None}, **config.scoring)
