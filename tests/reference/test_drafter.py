"""The drafter takes transformers' steps, and reads committed rows only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import HIDDEN, WINDOW, assert_different_logits, assert_same_logits, mtp_pair, randn, random_ids
from torch import Tensor
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from gemma4_kernels.reference import DrafterConfig, ReferenceConfig, ReferenceDrafter, ReferenceModel


def captured(target: Any, ids: Tensor) -> tuple[Any, Tensor, Tensor]:
    """The target's output on the committed tokens, the bonus token and the state that produced it."""
    out = target(ids, return_shared_kv_states=True, output_hidden_states=True)
    return out, out.logits[:, -1].argmax(-1), out.hidden_states[-1][:, -1]


@pytest.mark.parametrize("context", [WINDOW - 4, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("ordered_embeddings", [False, True])
def test_four_steps_give_the_logits_of_transformers(context: int, ordered_embeddings: bool) -> None:
    target, hf_drafter = mtp_pair(ordered_embeddings=ordered_embeddings)
    drafter = ReferenceDrafter.from_transformers(hf_drafter)
    out, token, hidden = captured(target, random_ids(2, context))
    shared = dict(out.shared_kv_states)
    token, hidden = token[:, None], hidden[:, None]
    for _ in range(4):
        inputs: dict[str, Any] = {
            "inputs_embeds": torch.cat((target.model.embed_tokens(token), hidden), dim=-1),
            "position_ids": torch.tensor([[context]]),
            "shared_kv_states": shared,
        }
        theirs, ours = hf_drafter(**inputs), drafter.step(**inputs)
        assert_same_logits(ours.logits, theirs.logits)
        assert_same_logits(ours.hidden, theirs.last_hidden_state)
        token, hidden = theirs.logits.argmax(-1), theirs.last_hidden_state


def test_padded_rows_are_hidden(hf_mtp: tuple[Any, Any], drafter: ReferenceDrafter) -> None:
    out, _, _ = captured(hf_mtp[0], random_ids(2, 20))
    inputs = {
        "inputs_embeds": randn(2, 1, 2 * HIDDEN),
        "position_ids": torch.tensor([[20], [13]]),
        "shared_kv_states": dict(out.shared_kv_states),
        # One column more than rows: the bonus token has its place already.
        "attention_mask": (torch.arange(21) >= torch.tensor([[0], [7]])).long(),
    }
    ours = drafter.logits(**inputs)
    assert_same_logits(ours, hf_mtp[1](**inputs).logits)
    assert_different_logits(ours, drafter.logits(**{**inputs, "attention_mask": None}))


def test_sliding_rows_may_be_the_newest_only(hf_mtp: tuple[Any, Any], drafter: ReferenceDrafter) -> None:
    out, _, _ = captured(hf_mtp[0], random_ids(1, 30))
    shared = dict(out.shared_kv_states)
    keys, values = shared["sliding_attention"]
    shared["sliding_attention"] = keys[:, :, -WINDOW + 1 :], values[:, :, -WINDOW + 1 :]
    inputs = {
        "inputs_embeds": randn(1, 1, 2 * HIDDEN),
        "position_ids": torch.tensor([[30]]),
        "shared_kv_states": shared,
        "attention_mask": (torch.arange(31) >= 4)[None].long(),
    }
    assert_same_logits(drafter.logits(**inputs), hf_mtp[1](**inputs).logits)


def test_several_queries_see_the_window_that_transformers_gives_them(
    hf_mtp: tuple[Any, Any], drafter: ReferenceDrafter
) -> None:
    out, _, _ = captured(hf_mtp[0], random_ids(1, 30))
    inputs = {
        "inputs_embeds": randn(1, 3, 2 * HIDDEN),
        "position_ids": torch.tensor([[30, 31, 32]]),
        "shared_kv_states": dict(out.shared_kv_states),
    }
    assert_same_logits(drafter.logits(**inputs), hf_mtp[1](**inputs).logits)


@pytest.mark.parametrize(("distance", "seen"), [(0, True), (WINDOW, True), (WINDOW + 1, False)])
def test_sliding_layers_see_the_newest_window_plus_one_rows(
    hf_mtp: tuple[Any, Any], drafter: ReferenceDrafter, distance: int, seen: bool
) -> None:
    out, _, _ = captured(hf_mtp[0], random_ids(1, 30))
    shared = dict(out.shared_kv_states)
    inputs = {"inputs_embeds": randn(1, 1, 2 * HIDDEN), "position_ids": torch.tensor([[30]])}
    before = drafter.logits(**inputs, shared_kv_states=shared)
    theirs_before = hf_mtp[1](**inputs, shared_kv_states=shared).logits
    keys, values = (rows.clone() for rows in shared["sliding_attention"])
    values[:, :, -1 - distance] += 10
    shared["sliding_attention"] = keys, values
    assert torch.equal(drafter.logits(**inputs, shared_kv_states=shared), before) is not seen
    assert torch.equal(hf_mtp[1](**inputs, shared_kv_states=shared).logits, theirs_before) is not seen


def test_drafts_are_those_of_transformers(hf_mtp: tuple[Any, Any], drafter: ReferenceDrafter) -> None:
    target, hf_drafter = hf_mtp
    ids = random_ids(1, 3 * WINDOW)
    out, token, hidden = captured(target, ids)
    hf_drafter.generation_config.num_assistant_tokens = 4
    generation_config = copy.deepcopy(target.generation_config)
    generation_config.max_length = 100
    generator = SinglePositionMultiTokenCandidateGenerator(hf_drafter, target.get_input_embeddings(), generation_config)
    candidates, logits = generator.get_candidates(
        torch.cat((ids, token[:, None]), dim=1), {}, out, is_first_iteration=False, n_last_matches=0
    )
    model = ReferenceModel.from_transformers(target)
    draft = drafter.draft(token, hidden, dict(out.shared_kv_states), model.embed, num_drafts=4)
    assert torch.equal(draft.tokens, candidates[:, ids.shape[1] + 1 :])
    assert logits is not None
    assert_same_logits(draft.logits, logits)


@pytest.mark.parametrize(("position", "offset"), [("bonus", 0), ("last_committed", -1)])
def test_all_drafts_stand_at_the_chosen_position(
    hf_mtp: tuple[Any, Any], drafter: ReferenceDrafter, position: Any, offset: int
) -> None:
    target, hf_drafter = hf_mtp
    out, token, hidden = captured(target, random_ids(1, 20))
    model = ReferenceModel.from_transformers(target)
    shared = dict(out.shared_kv_states)
    draft = drafter.draft(token, hidden, shared, model.embed, num_drafts=3, position=position)
    last_token, last_hidden = token[:, None], hidden[:, None]
    for step in range(3):
        theirs = hf_drafter(
            inputs_embeds=torch.cat((model.embed(last_token), last_hidden), dim=-1),
            position_ids=torch.tensor([[20 + offset]]),
            shared_kv_states=shared,
        )
        assert_same_logits(draft.logits[:, step], theirs.logits[:, 0])
        last_token, last_hidden = theirs.logits.argmax(-1), theirs.last_hidden_state


def test_requests_draft_alone_and_never_read_uncommitted_rows(
    hf_mtp: tuple[Any, Any], drafter: ReferenceDrafter
) -> None:
    target = hf_mtp[0]
    out, token, hidden = captured(target, random_ids(2, 30))
    model = ReferenceModel.from_transformers(target)
    committed = torch.tensor([30, 22])
    poisoned = {}
    for name, (keys, values) in out.shared_kv_states.items():
        keys, values = keys.clone(), values.clone()
        keys[1, :, 22:], values[1, :, 22:] = torch.nan, torch.nan
        poisoned[name] = keys, values
    both = drafter.draft(token, hidden, poisoned, model.embed, num_drafts=3, num_committed=committed)
    for request, length in enumerate(committed.tolist()):
        this = slice(request, request + 1)
        rows = {name: (k[this, :, :length], v[this, :, :length]) for name, (k, v) in out.shared_kv_states.items()}
        alone = drafter.draft(token[this], hidden[this], rows, model.embed, num_drafts=3)
        assert torch.equal(both.tokens[this], alone.tokens)
        assert_same_logits(both.logits[this], alone.logits)


def test_sliding_rows_can_be_limited_to_the_target_window(hf_mtp: tuple[Any, Any], drafter: ReferenceDrafter) -> None:
    target = hf_mtp[0]
    out, token, hidden = captured(target, random_ids(1, 30))
    model = ReferenceModel.from_transformers(target)
    shared = dict(out.shared_kv_states)
    limited = drafter.draft(token, hidden, shared, model.embed, num_drafts=2, sliding_rows=WINDOW)
    keys, values = shared["sliding_attention"]
    shared["sliding_attention"] = keys.clone(), values.clone()
    shared["sliding_attention"][1][:, :, :-WINDOW] = torch.nan
    assert not drafter.draft(token, hidden, shared, model.embed, num_drafts=2, sliding_rows=WINDOW).logits.isnan().any()
    assert not torch.equal(
        limited.logits, drafter.draft(token, hidden, dict(out.shared_kv_states), model.embed, num_drafts=2).logits
    )


@pytest.mark.parametrize("ordered_embeddings", [False, True])
def test_drafter_checkpoint_loads_strictly_both_ways(ordered_embeddings: bool) -> None:
    _, hf_drafter = mtp_pair(ordered_embeddings=ordered_embeddings)
    drafter = ReferenceDrafter(DrafterConfig.from_transformers(hf_drafter.config))
    drafter.load_state_dict(hf_drafter.state_dict(), strict=True)
    _, other = mtp_pair(seed=7, ordered_embeddings=ordered_embeddings)
    other.load_state_dict(drafter.state_dict(), strict=True)
    shared = {"sliding_attention": (randn(1, 8, 5, 256),) * 2, "full_attention": (randn(1, 1, 5, 512),) * 2}
    inputs = {
        "inputs_embeds": randn(1, 1, 2 * HIDDEN),
        "position_ids": torch.tensor([[5]]),
        "shared_kv_states": shared,
    }
    assert_same_logits(drafter.logits(**inputs).detach(), other(**inputs).logits)


def test_centroid_head_never_prefers_a_token_outside_its_clusters() -> None:
    _, hf_drafter = mtp_pair(ordered_embeddings=True)
    drafter = ReferenceDrafter.from_transformers(hf_drafter)
    shared = {"sliding_attention": (randn(4, 8, 5, 256),) * 2, "full_attention": (randn(4, 1, 5, 512),) * 2}
    logits = drafter.logits(randn(4, 1, 2 * HIDDEN), position_ids=torch.tensor([[5]]), shared_kv_states=shared)
    unscored = logits == logits.min()
    assert int((~unscored).sum()) == 4 * 3 * 20  # 4 rows, the 3 best of 20 clusters, 20 tokens each
    assert not unscored.gather(-1, logits.argmax(-1, keepdim=True)).any()


def test_a_layer_with_its_own_keys_is_refused(hf_mtp: tuple[Any, Any]) -> None:
    own = ReferenceConfig.from_transformers(hf_mtp[0].config)
    with pytest.raises(ValueError, match="num_kv_shared_layers: expected 6, all layers, got 0"):
        ReferenceDrafter(DrafterConfig(text=own, target_hidden_size=HIDDEN))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_drafts": 0}, "num_drafts: expected at least 1"),
        ({"position": "next"}, "position: expected one of"),
        ({"num_committed": torch.tensor([6])}, "num_committed: expected 1 numbers from 1 to 5"),
        ({"sliding_rows": 0}, "sliding_rows: expected"),
        ({"hidden": torch.zeros(1, 3)}, "token, hidden: expected"),
        ({"shared_kv_states": {"full_attention": (torch.zeros(1, 1, 5, 512),) * 2}}, "shared_kv_states: expected a"),
    ],
)
def test_bad_draft_arguments_are_refused_by_name(
    drafter: ReferenceDrafter, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "token": torch.tensor([1]),
        "hidden": torch.zeros(1, HIDDEN),
        "shared_kv_states": {
            "sliding_attention": (torch.zeros(1, 8, 5, 256),) * 2,
            "full_attention": (torch.zeros(1, 1, 5, 512),) * 2,
        },
        "num_drafts": 1,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        drafter.draft(**arguments, embed=lambda token_ids: torch.zeros(*token_ids.shape, HIDDEN))
