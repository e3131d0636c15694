"""A Terraform provider that knows its schema and nothing else: `python schema_provider.py SCHEMA.json`.

Terraform starts it over the plugin protocol. It serves init, validate and tests with a mocked provider; it
cannot plan or apply. Needs the packages `tf` and `grpcio`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tf.provider
from tf import runner
from tf.gen import tfplugin_pb2 as messages
from tf.gen import tfplugin_pb2_grpc as services

NESTING = {"single": 1, "list": 2, "set": 3}


def block_message(block: dict[str, Any]) -> Any:
    attributes = [
        messages.Schema.Attribute(
            name=name,
            type=json.dumps(attribute["type"]).encode(),
            required=attribute.get("required", False),
            optional=attribute.get("optional", False),
            computed=attribute.get("computed", False),
        )
        for name, attribute in sorted(block.get("attributes", {}).items())
    ]
    blocks = [
        messages.Schema.NestedBlock(
            type_name=name,
            block=block_message(nested["block"]),
            nesting=NESTING[nested["nesting_mode"]],
            min_items=nested.get("min_items", 0),
            max_items=nested.get("max_items", 0),
        )
        for name, nested in sorted(block.get("block_types", {}).items())
    ]
    return messages.Schema.Block(attributes=attributes, block_types=blocks)


def schema_message(schema: dict[str, Any]) -> Any:
    return messages.Schema(version=schema["version"], block=block_message(schema["block"]))


class Servicer(services.ProviderServicer):  # type: ignore[misc]
    """Answers with the schemas; accepts every value that they allow."""

    def __init__(self, schemas: dict[str, Any]) -> None:
        self.schemas = schemas

    def GetProviderSchema(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.GetProviderSchema.Response(
            provider=schema_message(self.schemas["provider"]),
            resource_schemas={k: schema_message(s) for k, s in self.schemas["resource_schemas"].items()},
            data_source_schemas={
                k: schema_message(s) for k, s in self.schemas["data_source_schemas"].items()
            },
        )

    def GetResourceIdentitySchemas(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.GetResourceIdentitySchemas.Response()

    def ValidateProviderConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.ValidateProviderConfig.Response()

    def ValidateResourceConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.ValidateResourceConfig.Response()

    def ValidateDataResourceConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.ValidateDataResourceConfig.Response()

    def StopProvider(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.StopProvider.Response()


if __name__ == "__main__":
    (known,) = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["provider_schemas"].values()
    tf.provider.ProviderServicer = lambda _: Servicer(known)
    runner.run_provider(None, argv=["provider"])
