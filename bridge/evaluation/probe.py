"""What the sender's states hold of a label: a linear probe, which no bridge should fall far behind.

Dimensions used in this file:
    B batch    S sender tokens    N sender width (all layers read)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentwire.bridge.evaluation.context import EvaluationContext
from latentwire.bridge.evaluation.tasks import Example, answer_text
from latentwire.bridge.models import hidden_states, pad_sources
from latentwire.bridge.reader import source_tokens

BATCH_ROWS = 32
FOLDS = 3
STRENGTHS = [0.001, 0.01, 0.1, 1.0]  # inverse ones of regularisation, from which the folds choose


@dataclass(frozen=True, kw_only=True)
class ProbeContext(EvaluationContext):
    """The same measurement with a fitted classifier in the receiver's place."""

    classifier: Any

    def pooled(self, chosen: Sequence[int]) -> list[NDArray[np.float32]]:
        """Mean state of each source over its tokens (N)."""
        return list(pooled_states(self, [self.examples[i].source for i in chosen]))

    def classified(self, chosen: Sequence[int], states: Sequence[NDArray[np.float32]]) -> list[str]:
        """The label of each, as the answer that would be said."""
        labels = self.classifier.predict(np.stack(states))
        return [
            answer_text(self.examples[i].prompt, self.task.labels[label])
            for i, label in zip(chosen, labels.tolist(), strict=True)
        ]


def fit_probe(
    context: EvaluationContext, examples: Sequence[Example], progress: Callable[[int, int], None] = lambda *_: None
) -> ProbeContext:
    """Fit multinomial logistic regression on the states the bridge reads, with the regularisation chosen by folds.

    Source: linear probes, Alain and Bengio 2016, arXiv:1610.01644 §3.
    """
    from sklearn.linear_model import LogisticRegression  # late: it takes a second
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    states = pooled_states(context, [example.source for example in examples], progress)
    labels = np.array([example.label for example in examples])
    rarest = int(np.unique(labels, return_counts=True)[1].min())
    regression: Any = LogisticRegression(max_iter=1000)
    if rarest >= FOLDS:
        regression = GridSearchCV(regression, {"C": STRENGTHS}, cv=FOLDS)
    classifier = make_pipeline(StandardScaler(), regression).fit(states, labels)
    known = {field.name: getattr(context, field.name) for field in fields(context)}
    return ProbeContext(**known, classifier=classifier)


@torch.inference_mode()
def pooled_states(
    context: EvaluationContext, sources: Sequence[str], progress: Callable[[int, int], None] = lambda *_: None
) -> NDArray[np.float32]:
    """Mean of each source's states over its tokens, at the layers that the bridge reads (sources × N)."""
    config, rows = context.bridge.config, context.lender.batch_rows or BATCH_ROWS
    made: list[NDArray[np.float32]] = []
    for start in range(0, len(sources), rows):
        part = [source_tokens(config, context.sender, text, truncate=True) for text in sources[start : start + rows]]
        with context.lender.lend(context.sender) as sender:
            ids, mask = pad_sources(sender, part)
            states = hidden_states(sender, ids, mask, config.layers).float() * mask[..., None]
        made.append((states.sum(dim=1) / mask.sum(dim=1, keepdim=True)).cpu().numpy())
        progress(start + len(part), len(sources))
    return np.concatenate(made)
