"""OpenTelemetry for both processes: where their spans go. Imported only where NIBBLE_TRACING is on.

The packages are those of the extra `tracing`. The exporter, the sampler and the batches are set by OpenTelemetry's own
variables (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/). The provider is not the
global one, so that libraries which trace by themselves add nothing.

What is said on spans is in `gateway/tracing.py` and `worker/tracing.py`, named as by the GenAI semantic conventions
where these have a name (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/). No span has text of a prompt
or an answer.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nibble.service.settings import SettingsError
from nibble.service.version import nibble_version

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer as Tracer

# What other values of these variables ask for is not there, and must not be ignored.
_ONLY = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}


def make_tracer(process: str, instance_id: str) -> Tracer:
    """A tracer that exports in the background, what is left of it when the process exits.

    process: `gateway` or `worker`. The variables may give the service another name than `nibble-<process>`.
    Raises SettingsError.
    """
    for name, value in _ONLY.items():
        if os.environ.get(name, value) != value:
            raise SettingsError(f"{name}: only {value} is supported (got {os.environ[name]!r})")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(f"NIBBLE_TRACING: the extra `tracing` is not installed ({error})") from error
    own = {"service.name": f"nibble-{process}", "service.version": nibble_version(), "service.instance.id": instance_id}
    resource = Resource.create().merge(Resource(own)).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("nibble", nibble_version())
