"""Under which tier's limits a text is sent: the one that was asked for, or the first that it fits."""

from __future__ import annotations

from collections.abc import Mapping

from condense_core.decoder.identity import same_name
from condense_core.neurons.routing.requests import RoutedRequest
from condense_core.neurons.tiers import Tier, Tiers
from condense_core.serving.errors import InvalidRequest, ServingError, TooLarge

_RATIO = 4.0


class UnknownTier(ServingError):
    """The gateway knows no such tier, or none of that model."""

    code, status = "unknown_tier", 404


def fitting_tiers(tiers: Tiers, shares: Mapping[str, float], request: RoutedRequest) -> list[str]:
    """The tiers that a request fits, those with a share of the incentive first, in the order of the tiers' file.

    shares: of the incentive, by tier.

    Raises:
        UnknownTier: there is none of that name, or for that model.
        InvalidRequest: it fits none; the message says the limits of all that count.
    """
    names = [
        name
        for name, tier in tiers.tiers.items()
        if request.tier in (None, name) and (request.model is None or same_name(request.model, tier.model))
    ]
    if not names:
        known = ", ".join(f"{name} of {tier.model.rpartition('/')[2]}" for name, tier in tiers.tiers.items())
        named = [f"{what} {value!r:.60}" for what in ("tier", "model") if (value := getattr(request, what)) is not None]
        raise UnknownTier(f"tier: got {' and '.join(named)}, expected one of {known}")
    fitting = [name for name in names if _fits(request, tiers.tiers[name])]
    if not fitting:
        raise _unfitting(tiers, names, request)
    return sorted(fitting, key=lambda name: shares.get(name, 0.0) <= 0)  # stable: else in the file's order


def ratio_for(request: RoutedRequest, tier: Tier, context_tokens: int) -> float | None:
    """What miners of a tier are asked for; None where so few soft tokens are wanted that it allows no such ratio.

    Of a number of soft tokens it is the next whole number, which all compressors take.
    """
    if request.max_soft_tokens is not None:
        ratio = max(-(-context_tokens // request.max_soft_tokens), tier.min_ratio)
        return float(ratio) if ratio <= tier.max_ratio else None
    return float(min(max(_RATIO, tier.min_ratio), tier.max_ratio) if request.ratio is None else request.ratio)


def limits_of(tiers: Tiers, names: list[str]) -> str:
    """The limits of some tiers, in words."""
    return "; ".join(
        f"{name} {t.min_chars:,} to {t.max_chars:,} characters, a question of up to {t.max_question_chars:,}, "
        f"ratios {t.min_ratio:g} to {t.max_ratio:g}"
        for name, t in ((name, tiers.tiers[name]) for name in names)
    )


def _fits(request: RoutedRequest, tier: Tier) -> bool:
    return (
        tier.min_chars <= len(request.text) <= tier.max_chars
        and len(request.question or "") <= tier.max_question_chars
        and (request.ratio is None or tier.min_ratio <= request.ratio <= tier.max_ratio)
    )


def _unfitting(tiers: Tiers, names: list[str], request: RoutedRequest) -> ServingError:
    asked = f"text: {len(request.text):,} characters"
    if request.question is not None:
        asked += f", a question of {len(request.question):,}"
    if request.ratio is not None:
        asked += f", a ratio of {request.ratio:g}"
    kind = TooLarge if len(request.text) > max(tiers.tiers[name].max_chars for name in names) else InvalidRequest
    return kind(f"{asked}; expected what fits a tier: {limits_of(tiers, names)}")
