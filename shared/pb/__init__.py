"""Protobuf and gRPC code of `protos/outrider/v1/speculation.proto`, made by `scripts/gen_protos`; never edited."""
