"""Which variables a recipe may set: none that say which code is run."""

import re
from pathlib import Path

from .errors import UsageError


# By kind, since no list of names is whole. What is refused by mistake is set in the shell.
_REFUSED = {
    "what an interpreter, a loader, a compiler or a shell reads to find code": (
        r"(PYTHON|LD_|DYLD_|BASH|PERL|RUBY|NODE_|JAVA|_JAVA|JDK_|LUA|GIT_|SSH_|PIP_|UV_|OMPI_|COVERAGE_|PYDEVD)"
        r"|(.*_)?\w*PATH(_.*)?$|XDG_(CONFIG|DATA)_.*|GLIBC_TUNABLES$|MPLBACKEND$"
        r"|(HOME|SHELL|SHELLOPTS|ENV|IFS|PS4|CC|CXX|CUDAHOSTCXX|(C|CXX|LD)FLAGS|(CUDA|ROCM)_HOME)$|NVCC_"
        r"|TRITON_|TORCH_EXTENSIONS_DIR$|TORCHINDUCTOR_CACHE_DIR$"
    ),
    "code, programs or unsafe files": (
        r"(.*_)?(TRUST|TRUSTED|CODE|EXEC|EXECUTE|EXECUTABLE|BINARY|BIN|UNSAFE|INSECURE|PICKLE|PLUGINS?|HOOKS?|PRELOAD|AUTOLOAD"
        r"|STARTUP|STARTED|COMMANDS?|CMD|SHELL|EDITOR|VISUAL|PAGER|BROWSER|ASKPASS|COMPILER|LIBRARY|LIBRARIES|MODULES?|KERNELS"
        r"|WEIGHTS_ONLY)(_.*)?$"
    ),
}
# Of Python's own, these change neither what is run nor where it is found.
_HARMLESS = {"PYTHONHASHSEED", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER"}


def check_variables(names: list[str], recipe: Path) -> None:
    """Refuse variables of a recipe's `env:` that could have other code run than the recipe says."""
    for name in names:
        for kind, pattern in _REFUSED.items():
            if name not in _HARMLESS and re.match(pattern, name.upper()):
                raise UsageError(
                    f"`env: {name}` in {recipe}: a recipe cannot set variables about {kind}. Set it in the shell, if you mean it"
                )
