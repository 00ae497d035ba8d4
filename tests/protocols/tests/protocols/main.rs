//! Services that report errors inside a 200, behind the layer.

mod graphql;
mod grpc;
mod support;
