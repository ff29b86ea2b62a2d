"""Names in TRL's docstring style, [`~trl.GRPOTrainer`], as plain code: other pages are linked from the signatures."""

import re
from typing import Any

import griffe


class Names(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", obj.docstring.value)
