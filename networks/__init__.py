"""Adapter modules for --network_module, each speaking the protocol of docs/architecture.md."""
