"""From the command line to a composed configuration (Hydra)."""

import difflib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainers.errors import ConfigError, Fault
from trainers.masking import hides

REPO = Path(__file__).resolve().parent.parent
CONFIG_DIR = REPO / "cfgs"
GROUPS = ("run_cfg", "trainer_cfg", "reward_cfg", "model_cfg", "data_cfg")
DEFAULT_RUN = "teacher_rlt_tiny"

# Names of the reference implementation for options that have a plainer one here, and what its null means.
SAME = {"unbias_student_log_probs_temp": "student_temperature"}
NULL_OF_SAME = {"unbias_student_log_probs_temp": 1.0}

OWN_FLAGS = ("--help", "-h", "--check", "--cfg")  # of train.py
MULTIRUN = ("-m", "--multirun")  # Hydra's

# `${repo:data/file.jsonl}` in a YAML file: a file that ships, wherever the launcher was started.
OmegaConf.register_new_resolver("repo", lambda path: str(REPO / path), replace=True)


def named_run(path: str | None) -> str | None:
    """NAME of `run:NAME`, the model that cfgs/run_cfg/NAME.yaml trains; None for any other model."""
    return path[4:] if path is not None and path.startswith("run:") else None


def _runs() -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / "run_cfg").glob("*.yaml"))


def find_run(name: str) -> str:
    """Return the run configuration that `name` means: a bare name, a file name or a path under cfgs/run_cfg.

    Raises:
        ConfigError: If there is none, with the names that exist.
    """
    stem = Path(name).name.removesuffix(".yaml")
    runs = _runs()
    parent = Path(name).parent
    inside = parent == Path() or (Path.cwd() / parent).resolve() == CONFIG_DIR / "run_cfg"
    inside = inside or (REPO / parent).resolve() == CONFIG_DIR / "run_cfg"
    if inside and stem in runs:
        return stem
    near = difflib.get_close_matches(stem, runs, n=1)
    remedy = f"did you mean {near[0]}.yaml?" if near else f"one of: {', '.join(runs)}"
    raise ConfigError(Fault(name, ..., "no such run configuration in cfgs/run_cfg", remedy))


def hydra_arguments(arguments: list[str]) -> list[str]:
    """Turn what a user types into Hydra's grammar; the first word chooses the run.

    A word without `=` names the run. `key=value` becomes `++key=value`, so that a key which no YAML file mentions
    can be set too; whether it exists is judged once, for the whole, by `load_options` (Hydra would ask for a `+`,
    and a typo with a `+` would become a silent new key).
    """
    _refuse_spaces(arguments)
    _refuse_sweeps(arguments)
    result, run = [], None
    for argument in arguments:
        key = argument.split("=", 1)[0].lstrip("+~")
        if argument in OWN_FLAGS:
            raise ConfigError(Fault(argument, ..., "there is another such word beside it", "one of them at a time"))
        if argument.startswith("-"):
            option, _, value = _shown(argument.lstrip("-")).partition("=")
            remedy = f"{option.replace('-', '_')}={value or '<value>'}; --help, --check and --cfg job are all that have"
            raise ConfigError(Fault(_shown(argument), ..., "options are written without dashes", remedy))
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            cause = "Hydra composes the configuration here, and neither makes folders nor logs"
            raise ConfigError(Fault(key, ..., cause, "leave it out; output_dir=<folder> is where a run writes"))
        if "=" not in argument and not argument.startswith("~"):
            run = find_run(argument)
        elif key in GROUPS or argument.startswith("~"):
            if key == "run_cfg" and argument.startswith("~"):
                raise ConfigError(Fault(argument, ..., "every run has one", "leave it out, or run_cfg=<another>"))
            if key == "run_cfg":
                run = find_run(argument.split("=", 1)[1])
            else:
                result.append(argument.lstrip("+") if key in GROUPS else argument)
        else:
            name, _, value = argument.lstrip("+").partition("=")
            result.append("++{}={}".format(*_plainly_named(name, value)))
    _check_grammar(word for word in result if "=" in word)
    stages = {f"++stage={stage}": stage for stage in ("score", "rescore", "merge")}
    default = next((stages[word] for word in result if word in stages), DEFAULT_RUN)
    return [f"run_cfg={run or default}", *result]


def _plainly_named(name: str, value: Any) -> tuple[str, Any]:
    """An option as it is called here, and its value."""
    is_null = str(value).strip().lower() in ("null", "none")
    return SAME.get(name, name), NULL_OF_SAME.get(name, value) if is_null else value


def _with_plain_names(composed: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """A composed configuration whose YAML files may name options as the reference implementation does. Beside a plainer
    name in a file such a name is left, to be refused: which of the two counts could not be told."""
    given = {word.lstrip("+").partition("=")[0] for word in words}
    for name, plain in SAME.items():
        if name in composed and plain in given:
            del composed[name]  # a word counts before a file
        elif name in composed and plain not in composed:
            key, value = _plainly_named(name, composed.pop(name))
            composed[key] = value
    return composed


def chosen_run(arguments: list[str]) -> str:
    """The run of cfgs/run_cfg that the words of a command line choose."""
    return hydra_arguments(arguments)[0].partition("=")[2]


def _refuse_spaces(arguments: list[str]) -> None:
    """`key = value` is three words to a shell.

    Raises:
        ConfigError: With what was meant.
    """
    meant = []
    for before, word, after in zip(["", *arguments], arguments, [*arguments[1:], ""], strict=False):
        if word.startswith("="):
            meant.append((before, word.removeprefix("=") or after))
        elif word.endswith("=") and word.count("=") == 1 and after and not _is_a_word_of_its_own(after):
            meant.append((word.removesuffix("="), after))
        elif "=" in word and (key := word.partition("=")[0]) != key.rstrip():  # in the shell's quotes
            meant.append((key.rstrip(), word.partition("=")[2].strip()))
    cause = "there are spaces around the equals sign"
    if meant:
        meant = [(key, _shown(f"{key}={value}").partition("=")[2]) for key, value in meant]
        pairs = [(f"{key} = {value}", f"{key or '<option>'}={value or '<value>'}") for key, value in meant]
        raise ConfigError([Fault(written, ..., cause, remedy) for written, remedy in pairs])


def _refuse_sweeps(arguments: list[str]) -> None:
    """Hydra's `-m` starts a run for each of several values.

    Raises:
        ConfigError: With the loop of a shell that does.
    """
    flag = next((word for word in arguments if word in MULTIRUN), None)
    if flag is None:
        return
    loops, words, parser = [], [], OverridesParser.create()
    for word in (_shown(word) for word in arguments if word not in MULTIRUN):
        key = word.lstrip("+").partition("=")[0]
        try:
            override = parser.parse_override(word) if "=" in word else None
            values = list(override.sweep_string_iterator()) if override and override.is_sweep_override() else []
        except HydraException:  # told once it is asked for without the flag
            values = []
        if values:
            variable = re.sub(r"\W", "_", key)
            loops.append((variable, " ".join(shlex.quote(value) for value in values)))
            words.append(f'{key}="${variable}"')
        else:
            words.append(shlex.quote(word))
    if not loops:
        loops, words = [("seed", "1 2")], [*words, 'seed="$seed"']
    remedy = " ".join(["./launch_mono.sh", *words])
    for variable, values in reversed(loops):
        remedy = f"for {variable} in {values}; do {remedy}; done"
    raise ConfigError(Fault(flag, ..., "a run has one value for each option; a shell loop starts several", remedy))


def _shown(word: str) -> str:
    """A word of the command line as a message may repeat it: one that holds a secret without its value."""
    return f"{word.partition('=')[0]}=<value>" if hides(word) else word


def _is_a_word_of_its_own(word: str) -> bool:
    """Whether it is no value that a space has parted from its key."""
    is_flag = re.match(r"--?[a-zA-Z]|~[^/]", word) is not None  # neither a negative number nor a folder
    return "=" in word or is_flag or Path(word).name.removesuffix(".yaml") in _runs()


def _check_grammar(overrides: Iterable[str]) -> None:
    faults, parser = [], OverridesParser.create()
    for word in overrides:
        key, _, value = _shown(word.lstrip("+")).partition("=")
        remedy = f"""in quotes, the shell's around Hydra's: '{key}="{value}"'"""
        try:
            if parser.parse_override(word).is_sweep_override():
                cause = "with commas it is a choice of several values, and a run has one"
                meant = "one of them" if key in GROUPS else f"one of them; a list: '{key}=[{value}]'; a text: {remedy}"
                faults.append(Fault(key, value, cause, meant))
        except HydraException:
            faults.append(Fault(key, value, "this is no value in Hydra's grammar", remedy))
    if faults:
        raise ConfigError(faults)


def _resolved(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as a flat mapping.

    Raises:
        ConfigError: If a `${...}` in it leads nowhere.
    """
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        cause = (error.msg or str(error)).splitlines()[0]
        raise ConfigError(Fault(error.full_key or "configuration", ..., cause, "correct what stands in ${}")) from error


def compose_run(name: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Compose `cfgs/run_cfg/<name>.yaml` with overrides into a flat mapping; an empty name is the default run.

    Raises:
        ConfigError: If a file or a word of it cannot be read.
    """
    GlobalHydra.instance().clear()
    words = hydra_arguments([*([name] if name else []), *(overrides or [])])
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = compose("train", overrides=words)
    except (HydraException, YAMLError) as error:
        cause, remedy = " ".join(str(error).split()), "correct what it names, in cfgs/ or on the command line"
        raise ConfigError(Fault("configuration", ..., cause, remedy)) from error
    return _with_plain_names(_resolved(config), words)
