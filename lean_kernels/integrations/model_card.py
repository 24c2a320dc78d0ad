# SPDX-License-Identifier: Apache-2.0
"""The README.md that is saved with a lean model."""

from lean_kernels.report import LeanReport
from lean_kernels.spec import FORMAT_VERSION

_CARD = """---
library_name: transformers
tags:
- lean_kernels
- block-sparse
---

# {title}

{architecture} with block-sparse linear layers. {summary}.

## How to load

```
pip install "lean_kernels[hf]"
```

```python
import lean_kernels

model = lean_kernels.load("<this directory>")
```

After `import lean_kernels`, `from_pretrained` of `{architecture}` and of the `AutoModel` classes
loads it too. Without the import they stop with a size mismatch.

## What is lean

{table}

Pruning changes what a model computes; at low density it needs training to keep its accuracy.

Format version {version} of `quant_method: lean`.
"""


def model_card(title: str, architecture: str, report: LeanReport) -> str:
    """Markdown: how to load the model, and which of its layers are lean."""
    header, *rows = (" | ".join(cells) for cells in report.rows())
    rule = " | ".join("---" for _ in report.rows()[0])
    return _CARD.format(
        title=title,
        architecture=architecture,
        summary=report.summary().replace("->", "to"),
        table="\n".join(f"| {line} |" for line in (header, rule, *rows)),
        version=FORMAT_VERSION,
    )
