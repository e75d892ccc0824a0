"""Caches for Hydra's composition, which more than halve its time."""

import pickle
from functools import cache, wraps
from pathlib import Path

import omegaconf._utils
import omegaconf.base
import omegaconf.grammar_parser
import omegaconf.resolvers.oc
from hydra._internal import defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins


def cache_composition() -> None:
    """Caches config files until they change, and OmegaConf's parsed expressions.

    The map for interpolated defaults is built only if there are any; ``conf/`` has none.
    """
    Plugins.instance()  # imports the sources again
    files, packaged = map(SourcesRegistry.instance().resolve, ("file", "pkg"))
    if not hasattr(files.load_config, "__wrapped__"):
        files.load_config = _cached(files.load_config, _state_of_file)
        packaged.load_config = _cached(packaged.load_config, lambda _source, _name: True)  # installed files
        parse = cache(omegaconf.grammar_parser.parse)  # the tree is only read
        for module in (omegaconf._utils, omegaconf.base, omegaconf.grammar_parser, omegaconf.resolvers.oc):
            module.parse = parse
        create = defaults_list._create_interpolation_map
        defaults_list._create_interpolation_map = lambda overrides, defaults, self_added: (
            create(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else None
        )


def _cached(load, state_of):
    """Wraps a source's ``load_config``; returns copies of a file's cached contents while its state is the same."""
    contents = {}

    @wraps(load)
    def load_config(source, config_path):
        state = state_of(source, config_path)
        key = (source.provider, source.path, config_path, state)
        if not state:
            return load(source, config_path)  # raises the error
        if key not in contents:
            contents[key] = pickle.dumps(load(source, config_path))
        return pickle.loads(contents[key])  # seven times faster than OmegaConf's copy

    return load_config


def _state_of_file(source, name):
    file = Path(source.path, source._normalize_file_name(name))
    facts = file.stat() if file.exists() else None
    return facts and (facts.st_ino, facts.st_mtime_ns, facts.st_size)
