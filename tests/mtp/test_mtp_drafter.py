"""The drafter drafts what transformers and the reference draft, from committed rows only, wherever they lie."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from mtp_helpers import committed, in_a_ring, in_pages, pair, values_only
from small_models import WINDOW, assert_same_logits, random_ids
from torch import Tensor
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from gemma4_kernels.mtp.drafter import Drafter, DraftSampling
from gemma4_kernels.mtp.rows import SharedRows
from gemma4_kernels.reference import ReferenceDrafter

TOLERANCE = 1e-4
WITH_LOGITS = DraftSampling(temperature=0.0)
"""Greedy, with the logits."""
POSITIONS = [("bonus", 0), ("last_committed", -1)]


def drafter_of(ordered_embeddings: bool = False) -> Drafter:
    return Drafter.from_model(pair(ordered_embeddings)[1])


def assert_same_drafts(ours: Any, tokens: Tensor, logits: Tensor, tolerance: float = TOLERANCE) -> None:
    """The centroid head gives tokens outside its clusters -inf, transformers and the reference a finite value."""
    assert torch.equal(ours.tokens, tokens)
    scored = ours.logits > -torch.inf
    assert_same_logits(ours.logits[scored], logits[scored], tolerance)


@pytest.mark.parametrize("context", [1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 5 * WINDOW + 3])
@pytest.mark.parametrize("ordered_embeddings", [False, True])
@pytest.mark.parametrize(("position", "offset"), POSITIONS)
def test_four_steps_are_those_of_transformers(
    context: int, ordered_embeddings: bool, position: Any, offset: int
) -> None:
    target, assistant = pair(ordered_embeddings)
    now = committed(target, [context, context])
    drafts = drafter_of(ordered_embeddings).draft(
        **now.arguments, num_drafts=4, position=position, sampling=WITH_LOGITS
    )
    token, hidden = now.tokens[:, None], now.hidden[:, None]
    tokens, logits = [], []
    for _ in range(4):
        theirs = assistant(
            inputs_embeds=torch.cat((now.embed(token), hidden), dim=-1),
            position_ids=torch.tensor([[context + offset]]),
            shared_kv_states=now.hf_rows,
        )
        token, hidden = theirs.logits.argmax(-1), theirs.last_hidden_state
        tokens.append(token)
        logits.append(theirs.logits)
    assert_same_drafts(drafts, torch.cat(tokens, dim=1), torch.cat(logits, dim=1))


@pytest.mark.parametrize("context", [WINDOW + 1, 3 * WINDOW])
def test_drafts_are_those_of_transformers_generation(context: int) -> None:
    target, assistant = pair()
    ids = random_ids(1, context)
    out = target(ids, return_shared_kv_states=True, output_hidden_states=True)
    now = committed(target, [context])
    assistant = copy.deepcopy(assistant)
    assistant.generation_config.num_assistant_tokens = 4
    generation_config = copy.deepcopy(target.generation_config)
    generation_config.max_length = 100
    generator = SinglePositionMultiTokenCandidateGenerator(assistant, target.get_input_embeddings(), generation_config)
    candidates, _ = generator.get_candidates(
        torch.cat((ids, now.tokens[:, None]), dim=1), {}, out, is_first_iteration=False, n_last_matches=0
    )
    assert torch.equal(drafter_of().draft(**now.arguments, num_drafts=4).tokens, candidates[:, context + 1 :])


@pytest.mark.parametrize("ordered_embeddings", [False, True])
@pytest.mark.parametrize("position", ["bonus", "last_committed"])
@pytest.mark.parametrize("sliding_rows", [None, 1, WINDOW, WINDOW + 1])
def test_requests_of_different_lengths_draft_what_the_reference_drafts(
    ordered_embeddings: bool, position: Any, sliding_rows: int | None
) -> None:
    target, assistant = pair(ordered_embeddings)
    now = committed(target, [WINDOW, 3 * WINDOW, 2, WINDOW + 2], rejected=3)
    options: dict[str, Any] = {"num_drafts": 4, "position": position, "sliding_rows": sliding_rows}
    expected = ReferenceDrafter.from_transformers(assistant).draft(
        now.tokens, now.hidden, now.hf_rows, now.embed, num_committed=now.rows.lengths, **options
    )
    drafter = drafter_of(ordered_embeddings)
    assert_same_drafts(
        drafter.draft(**now.arguments, sampling=WITH_LOGITS, **options), expected.tokens, expected.logits
    )
    greedy = drafter.draft(**now.arguments, **options)
    assert greedy.logits is None
    assert torch.equal(greedy.tokens, expected.tokens)


def everywhere(rows: SharedRows, target: Any, page_size: int = 4) -> dict[str, SharedRows]:
    """The same rows as all kinds of caches hold them."""
    lean = values_only(rows, target)
    return {
        "keys and values": rows,
        "values": lean,
        "pages": SharedRows(in_pages(rows.sliding, page_size), in_pages(rows.full, page_size), rows.lengths),
        "pages of values": replace(lean, sliding=in_pages(rows.sliding, 3), full=in_pages(lean.full, page_size)),
    }


@pytest.mark.parametrize("cache", ["keys and values", "values", "pages", "pages of values"])
def test_rows_behind_the_committed_ones_do_not_matter(cache: str) -> None:
    target = pair()[0]
    lengths = [WINDOW, 2 * WINDOW + 5, 3]
    now = committed(target, lengths, rejected=5)
    drafter = drafter_of()
    before = drafter.draft(
        now.tokens, now.hidden, everywhere(now.rows, target)[cache], now.embed, 3, sampling=WITH_LOGITS
    )
    changed = {name: (keys.clone(), values.clone()) for name, (keys, values) in now.hf_rows.items()}
    for request, length in enumerate(lengths):
        for tensors in changed.values():
            for tensor in tensors:
                tensor[request, :, length:] = 100.0 * torch.randn_like(tensor[request, :, length:])
    layers = [
        replace(layer, keys=changed[name][0].transpose(1, 2), values=changed[name][1].transpose(1, 2))
        for name, layer in (("sliding_attention", now.rows.sliding), ("full_attention", now.rows.full))
    ]
    rows = everywhere(SharedRows(*layers, now.rows.lengths), target)[cache]
    after = drafter.draft(now.tokens, now.hidden, rows, now.embed, 3, sampling=WITH_LOGITS)
    assert before.logits is not None
    assert after.logits is not None
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.tokens, after.tokens)


@pytest.mark.parametrize("cache", ["values", "pages", "pages of values"])
@pytest.mark.parametrize("position", ["bonus", "last_committed"])
def test_drafts_do_not_depend_on_how_rows_are_kept(cache: str, position: Any) -> None:
    target = pair()[0]
    now = committed(target, [WINDOW, 3 * WINDOW + 1, 1], rejected=2)
    drafter = drafter_of()
    options: dict[str, Any] = {"num_drafts": 4, "position": position, "sampling": WITH_LOGITS}
    expected = drafter.draft(**now.arguments, **options)
    got = drafter.draft(now.tokens, now.hidden, everywhere(now.rows, target)[cache], now.embed, **options)
    assert expected.logits is not None
    assert_same_drafts(got, expected.tokens, expected.logits)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_a_ring_still_holds_all_visible_rows_after_a_rejection(page_size: int, kept: int) -> None:
    target, num_drafts = pair()[0], 4
    before = [2, WINDOW, 40]  # committed when the target verified the bonus token and 4 drafts
    lengths = [length + kept for length in before]
    now = committed(target, lengths, rejected=num_drafts)
    written = [length + num_drafts + 1 for length in before]
    ring = in_a_ring(now.rows.sliding, written, tentative_rows=num_drafts + 1, page_size=page_size)
    drafter = drafter_of()
    dense = drafter.draft(**now.arguments, num_drafts=num_drafts, sampling=WITH_LOGITS)
    rows = replace(now.rows, sliding=ring)
    turned = drafter.draft(now.tokens, now.hidden, rows, now.embed, num_drafts, sampling=WITH_LOGITS)
    assert dense.logits is not None
    assert turned.logits is not None
    assert torch.equal(dense.tokens, turned.tokens)
    assert torch.equal(dense.logits, turned.logits)
