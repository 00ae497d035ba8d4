//! SeaORM's streams of rows, with the feature `stream`.

use std::{future::Future, pin::Pin, vec::IntoIter};

use futures_util::stream::{self, Iter};
use sea_orm::{ConnectionTrait, DbBackend, DbErr, QueryResult, Statement, StreamTrait};

use super::{NestedTx, Tx};

/// All rows are read before the first comes: a stream that is dropped halfway, or kept, leaves no statement in progress that
/// would fail the handle or hold up others. For more rows than fit into memory, stream from a connection of your own.
impl StreamTrait for Tx {
    type Stream<'a> = Iter<IntoIter<Result<QueryResult, DbErr>>>;

    fn get_database_backend(&self) -> DbBackend {
        ConnectionTrait::get_database_backend(self)
    }

    fn stream_raw<'a>(
        &'a self,
        statement: Statement,
    ) -> Pin<Box<dyn Future<Output = Result<Self::Stream<'a>, DbErr>> + Send + 'a>> {
        Box::pin(async move {
            let rows = self.query_all_raw(statement).await?;
            Ok(stream::iter(rows.into_iter().map(Ok).collect::<Vec<_>>()))
        })
    }
}

/// As that of [`Tx`].
impl StreamTrait for NestedTx {
    type Stream<'a> = <Tx as StreamTrait>::Stream<'a>;

    fn get_database_backend(&self) -> DbBackend {
        ConnectionTrait::get_database_backend(self)
    }

    fn stream_raw<'a>(
        &'a self,
        statement: Statement,
    ) -> Pin<Box<dyn Future<Output = Result<Self::Stream<'a>, DbErr>> + Send + 'a>> {
        Tx::stream_raw(self, statement)
    }
}
