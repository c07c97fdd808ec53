"""The k largest entries of rows on a CPU: of the groups with the largest maxima only.

torch.topk looks at every entry with a branch. Here entries fall into groups by id, whose maxima
take one pass of vector instructions, and torch.topk chooses groups, then entries of these.

Legend: R rows, V vocabulary, W entries of a group, G groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["largest_entries"]

_WIDTH = 64
"""W. Time of k = 29 and 64 at V = 49,152 is flat from 16 to 128."""
_FEWEST_GROUPS_EACH = 4
"""Groups for each of k entries, below which too little is left out."""


def largest_entries(z_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and ids of the k largest, from the largest on, as torch.topk does.

    Which of equal entries are among the k is torch.topk's choice too: where the last one has an
    equal outside, it is asked. Only the order of equal entries among the k may differ from its.

    Args:
        z_RV: float32, rows contiguous.
        k: at most V.
    """
    import torch

    rows, vocab = z_RV.shape
    groups = vocab // _WIDTH
    if z_RV.device.type != "cpu" or groups < _FEWEST_GROUPS_EACH * (k + 1):
        return torch.topk(z_RV, k, dim=-1)
    grouped_RWG = z_RV[:, : _WIDTH * groups].view(rows, _WIDTH, groups)
    # All that is larger than the (k + 1)th largest lies in the k + 1 groups of the largest maxima.
    chosen_Rk = grouped_RWG.amax(1).topk(k + 1, dim=-1).indices
    rest_RV = z_RV[:, _WIDTH * groups :]
    some_RWk = grouped_RWG.gather(2, chosen_Rk[:, None, :].expand(-1, _WIDTH, -1))
    found = torch.cat([some_RWk.reshape(rows, -1), rest_RV], dim=-1).topk(k + 1, dim=-1)
    place_Rk = found.indices[:, :k]
    line_Rk = place_Rk // (k + 1)
    ids_Rk = chosen_Rk.gather(1, place_Rk % (k + 1)) + line_Rk * groups
    if vocab > _WIDTH * groups:  # what is left over stands behind the groups
        behind_Rk = place_Rk - _WIDTH * (k + 1)
        ids_Rk = ids_Rk.where(behind_Rk < 0, behind_Rk + _WIDTH * groups)
    values_Rk = found.values[:, :k]
    ambiguous_R = found.values[:, k - 1] == found.values[:, k]
    if bool(ambiguous_R.any()):
        asked = torch.topk(z_RV[ambiguous_R], k, dim=-1)
        values_Rk = values_Rk.index_put((ambiguous_R,), asked.values)
        ids_Rk = ids_Rk.index_put((ambiguous_R,), asked.indices)
    return values_Rk, ids_Rk
