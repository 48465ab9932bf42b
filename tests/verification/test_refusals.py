"""Bad input is refused by name."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import DeviceError, DTypeError, ShapeError, StrideError, sample_tokens, verify_drafts

LOGITS, DRAFTS = torch.zeros(2, 4, 10), torch.zeros(2, 3, dtype=torch.long)
NAN = float("nan")
CASES = [
    ({"logits": torch.zeros(4, 10)}, ShapeError, r"logits must have shape \(B, K \+ 1, V\), got \(4, 10\)"),
    ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
    ({"logits": torch.zeros(2, 4, 10, dtype=torch.long)}, DTypeError, "logits must be bfloat16 or .*, got int64"),
    ({"logits": torch.zeros(2, 4, 20)[..., ::2]}, StrideError, "logits must be dense in its last dim"),
    ({"logits": torch.zeros(2, 4, 0)}, ShapeError, "logits must have at least one row and 1 to"),
    ({"logits": torch.zeros(2, 0, 10)}, ShapeError, "logits must have at least one row"),
    ({"draft_tokens": torch.zeros(2, 4, dtype=torch.long)}, ShapeError, r"draft_tokens must have shape \(2, 3\)"),
    ({"draft_tokens": torch.zeros(2, 3)}, DTypeError, "draft_tokens must be int32 or int64, got float32"),
    ({"draft_tokens": torch.full((2, 3), 10)}, ValueError, r"a draft of draft_tokens must lie in \[0, 9\], got 10"),
    ({"draft_tokens": torch.full((2, 3), -1)}, ValueError, "a draft of draft_tokens .* got -1"),
    ({"draft_tokens": DRAFTS.to("meta")}, DeviceError, "draft_tokens must be on cpu like logits, got meta"),
    ({"num_drafts": torch.tensor([0, 4])}, ValueError, r"num_drafts must lie in \[0, 3\], got 4"),
    ({"num_drafts": torch.tensor([-1, 3])}, ValueError, r"num_drafts must lie in \[0, 3\], got -1"),
    ({"num_drafts": torch.tensor([1])}, ShapeError, r"num_drafts must have shape \(2\)"),
    ({"num_drafts": torch.tensor([1.0, 2.0])}, DTypeError, "num_drafts must be int32 or int64"),
    ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative, got -1"),
    ({"temperature": NAN}, ValueError, "temperature must be finite and not negative, got nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be finite"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
    ({"temperature": torch.tensor([1.0, NAN])}, ValueError, r"temperature must be 0 \(greedy\) or .*, got nan"),
    ({"temperature": torch.tensor([1.0])}, ShapeError, r"temperature must have shape \(2\), got \(1\)"),
    ({"temperature": torch.tensor([1, 1])}, DTypeError, "temperature must be bfloat16 or"),
    ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
    ({"top_k": 2.5}, TypeError, "top_k must be a whole number, got 2.5"),
    ({"top_k": torch.tensor([1, -2])}, ValueError, "top_k must lie in .* got -2"),
    ({"top_p": 1.5}, ValueError, "top_p must be from 0 to 1, got 1.5"),
    ({"top_p": NAN}, ValueError, "top_p must be from 0 to 1, got nan"),
    ({"top_p": torch.tensor([0.5, 2.0])}, ValueError, "top_p must be from 0 to 1, got 2"),
    ({"min_p": -0.1}, ValueError, "min_p must be from 0 to 1, got -0.1"),
    ({"min_p": torch.tensor([0.5, NAN])}, ValueError, "min_p must be from 0 to 1, got nan"),
    ({"softcap": -1.0}, ValueError, "softcap must be finite and not negative"),
    ({"seeds": 3}, ValueError, "positions must be given with seeds"),
    ({"seeds": 3.5, "positions": 0}, TypeError, "seeds must be a whole number"),
    ({"seeds": 2**63, "positions": 0}, ValueError, "seeds must fit into 64 bits"),
    ({"seeds": torch.tensor([1]), "positions": 0}, ShapeError, r"seeds must have shape \(2\)"),
    ({"seeds": 1, "positions": -1}, ValueError, "positions must be at least 0, got -1"),
    ({"seeds": 1, "positions": torch.tensor([0, -1])}, ValueError, "positions must lie in .* got -1"),
    ({"method": "hope"}, ValueError, "method must be one of match, rejection, block, got 'hope'"),
    ({"draft_logits": torch.zeros(2, 3, 10)}, ValueError, "draft_logits must be None with method"),
    (
        {"draft_logits": torch.zeros(2, 3, 9), "method": "block"},
        ShapeError,
        r"draft_logits must have shape \(2, 3, 10\), got \(2, 3, 9\)",
    ),
    ({"eos_token_ids": [1.5]}, TypeError, "an element of eos_token_ids must be a whole number"),
    ({"eos_token_ids": [-1]}, ValueError, "an element of eos_token_ids must be at least 0"),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0"),
    ({"max_new_tokens": torch.tensor([3, -3])}, ValueError, "max_new_tokens must lie in .* got -3"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=f"verify_drafts: {message}"):
        verify_drafts(**{"logits": LOGITS, "draft_tokens": DRAFTS, **changes})


def test_sampling_names_itself():
    with pytest.raises(ShapeError, match=r"sample_tokens: logits must have shape \(B, V\)"):
        sample_tokens(LOGITS)
    with pytest.raises(ValueError, match="sample_tokens: stream must be one of target, draft, got 'mine'"):
        sample_tokens(LOGITS[0], stream="mine")
    with pytest.raises(ValueError, match="sample_tokens: top_p must be from 0 to 1"):
        sample_tokens(LOGITS[0], top_p=torch.full((4,), 3.0))


def test_what_lies_behind_the_drafts_of_a_request_may_be_anything():
    drafts = torch.tensor([[0, -1, 99], [-7, -7, -7]])
    result = verify_drafts(LOGITS, drafts, torch.tensor([1, 0]), temperature=0.0)
    assert result.tokens.tolist() == [[0, 0, -1, -1], [0, -1, -1, -1]]
