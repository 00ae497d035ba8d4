//! The code of the page about gRPC and GraphQL, and tests with real servers and clients. A package of its own, so that
//! nobody who uses the outbox builds their libraries.

#![cfg_attr(doctest, doc = include_str!("../../../docs/protocols.md"))]
