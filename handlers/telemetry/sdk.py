"""What the SDK of OpenTelemetry needs to make spans with given ids."""

import random
import re

from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Sampler, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    set_span_in_context,
)

from backends import TraceContext

NOWHERE = Context()
_ROOT = re.compile(
    r"(?:ParentBased\{root:)?"
    r"(AlwaysOnSampler|AlwaysOffSampler|TraceIdRatioBased)(?:\{([-+.e\d]+)\})?(?:,.*|)"
)


class GivenIds(IdGenerator):
    """Gives each span the ids that were chosen for it before."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


def linked(traceparent: str) -> SpanContext:
    """Return the context of a span that another one links."""
    _, trace_id, span_id, flags = traceparent.split("-")
    return _span_context(trace_id, span_id, flags)


def _span_context(
    trace_id: str, span_id: str, flags: str, remote: bool = False
) -> SpanContext:
    return SpanContext(
        int(trace_id, 16), int(span_id, 16), remote, TraceFlags(int(flags, 16))
    )


def context_of(place: TraceContext | None, remote: bool) -> Context:
    """Return the parent context for the SDK; None begins a trace."""
    if place is None or not place.span_id:
        return NOWHERE
    span_context = _span_context(place.trace_id, place.span_id, place.flags, remote)
    return set_span_in_context(NonRecordingSpan(span_context), NOWHERE)


def bound_of(sampler: Sampler) -> int | None:
    """Return the bound of the lower half of the id of traces that are recorded.

    None if the sampler decides otherwise. The SDK's own samplers are recognized by
    their descriptions.
    """
    described = _ROOT.fullmatch(sampler.get_description())
    if described is None:
        return None
    name, rate = described.groups()
    if name == "TraceIdRatioBased":
        return TraceIdRatioBased.get_bound_for_rate(float(rate))
    return 2**64 if name == "AlwaysOnSampler" else 0


def new_span_id() -> str:
    """Return the id of a new span: 16 hexadecimal digits."""
    return random.randbytes(8).hex()
