//! The event of all measurements, about 200 bytes.

use outbox_core::Event;
use serde::{Deserialize, Serialize};

pub(crate) const SUBSCRIPTION: &str = "sink";

const TEXT: &str = "0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrst";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Happened {
    pub(crate) n: usize,
    key: String,
    text: String,
}

impl Happened {
    pub(crate) fn new(n: usize, key: usize) -> Self {
        Self::of(n, key.to_string())
    }

    pub(crate) fn of(n: usize, key: String) -> Self {
        Self { n, key, text: TEXT.to_owned() }
    }
}

impl Event for Happened {
    const TYPE: &'static str = "bench.happened";
    const AGGREGATE_TYPE: &'static str = "bench";

    fn aggregate_id(&self) -> String {
        self.key.clone()
    }
}
