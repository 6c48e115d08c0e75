r"""Whether a picture has a main object at all, by what a classifier makes of it.

Accumulated attention needs one (thesis section 4.3.6): of a landscape any region may be called
the class. Symbols: :math:`y` are the class scores, :math:`M` the deepest stage's LayerCAM map of
a class, :math:`n` its places.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..explain import stage_maps
from ..stages import Staged

__all__ = ["lacks_object", "object_signs"]


def object_signs(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None = None,
) -> pd.DataFrame:
    r"""Measures how strongly a network answers to pictures, and how widely it looks.

    .. math:: \text{energy} = \log \sum_c e^{y_c}, \qquad
        \text{spread} = -\frac{1}{\log n} \sum_{ij} q_{ij} \log q_{ij}, \quad
        q = M \Big/ \sum_{ij} M_{ij}

    The two fail differently: scenery gets a low energy; noise may get a high one, but then the
    map is spread. The probability of the best class is worse than both: it does not say how
    large the scores are.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image, whose map it is; the one with the
            highest score if None.

    Returns:
        One row per image: ``energy``, in the unit of the scores, and ``spread``, from 0 (one
        place) to 1 (everywhere alike; also a map that is zero).

    References:
        Energy-based Out-of-distribution Detection (Liu et al., 2020),
        https://arxiv.org/abs/2010.03759.
    """
    found = stage_maps(net, images, class_ids, stages=[len(net.stage_names)])
    flat = found["layercam"][0].flatten(1).double()
    shares = flat / flat.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=1) / np.log(flat.shape[1])
    energy = found.scores.double().logsumexp(dim=1)
    return pd.DataFrame({"energy": energy.cpu(), "spread": entropy.nan_to_num(1).cpu()})


def lacks_object(
    signs: pd.DataFrame, reference: pd.DataFrame, rate: float = 0.05
) -> Bool[np.ndarray, " b"]:
    """Says which pictures look unlike those with an object: less energy, or more spread.

    The limits are chosen so that each sign would accuse half of `rate` of the reference. They
    belong to one network and one kind of pictures.

    Args:
        signs: From :func:`object_signs`.
        reference: The same of other pictures that have a main object, some 100 or more.
        rate: Share of pictures with an object that may be accused, in (0, 1).

    Returns:
        True where a warning is due.

    Raises:
        ValueError: `rate` is out of range, there is no reference, or a sign is missing.
    """
    if not 0 < rate < 1:
        raise ValueError(f"expected `rate` in (0, 1), got {rate}")
    if not len(reference):
        raise ValueError("expected pictures with an object in `reference`, got none")
    for name, table in (("signs", signs), ("reference", reference)):
        lacking = [column for column in ("energy", "spread") if column not in table]
        if lacking or table[["energy", "spread"]].isna().any(axis=None):
            raise ValueError(
                f"expected `{name}` with numbers for energy and spread, got "
                f"{f'none for {lacking[0]}' if lacking else 'NaN'}; see object_signs"
            )
    lowest = reference["energy"].quantile(rate / 2)
    widest = reference["spread"].quantile(1 - rate / 2)
    return ((signs["energy"] < lowest) | (signs["spread"] > widest)).to_numpy()
