# SPDX-License-Identifier: Apache-2.0
"""The README.md that is saved with a lean model."""

from lean_kernels._files import Marker
from lean_kernels.report import LeanReport

MARKER = Marker("README.md", "`quant_method: lean`")

_CARD = """---
library_name: transformers
tags:
- lean_kernels{tags}
---

# {title}

{architecture}, made lean: {summary}.

## How to load

```
pip install "lean_kernels[hf]"
```

```python
import lean_kernels

model = lean_kernels.load("<this directory>")
```

After `import lean_kernels`, `from_pretrained` of `{architecture}` and of the `AutoModel` classes
loads it too. Without the import they {without}.

## What is lean

{table}

Pruning, compressing embeddings, dropping tokens and leaving early change what a model computes; it
needs training for them to keep its accuracy. Running without padding changes nothing.

Format version {version} of {marker}.
"""


def model_card(title: str, architecture: str, report: LeanReport, version: int) -> str:
    """Markdown: how to load the model, and which of its layers are lean."""
    header, *rows = (" | ".join(cells) for cells in report.rows())
    rule = " | ".join("---" for _ in report.rows()[0])
    sparse = report.replaced > 0
    stops = sparse or report.embeddings
    return _CARD.format(
        title=title,
        tags="\n- block-sparse" if sparse else "",
        without="stop with a size mismatch" if stops else "load the dense model",
        architecture=architecture,
        summary=report.summary().replace("->", "to"),
        table="\n".join(f"| {line} |" for line in (header, rule, *rows)),
        version=version,
        marker=MARKER.text,
    )
