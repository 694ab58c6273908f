"""Completion in the shell, through the script that ``--show-completion`` prints, although verbs load lazily."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ASK = """eval "$(metier --show-completion)"
COMP_WORDS=({words}); COMP_CWORD={at}; _metier_completion metier; echo "${{COMPREPLY[@]}}"
"""


def completed(*words: str) -> list[str]:
    script = ASK.format(words=" ".join(w or '""' for w in words), at=len(words) - 1)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=os.environ | {"PATH": path})
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("metier", "tr"), {"train"}),
        (("metier", "train", "--re"), {"--restart"}),
        (("metier", "data", ""), {"preview", "check"}),
        (("metier", ""), {"list", "show", "compare"}),
    ],
)
def test_verbs_and_options(words, expected):
    assert expected <= set(completed(*words))
