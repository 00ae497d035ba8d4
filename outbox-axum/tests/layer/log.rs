//! The log of all tests of this binary.

use std::sync::{Mutex, Once, PoisonError};

use tracing_subscriber::fmt::MakeWriter;

static START: Once = Once::new();
static LINES: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Starts to record. One subscriber for the whole process: a subscriber of one thread misses what other threads made
/// `tracing` believe nobody wants.
pub(crate) fn record() {
    START.call_once(|| tracing_subscriber::fmt().with_ansi(false).with_writer(Lines).init());
}

/// The recorded lines in which this stands. Tests run side by side, so it should be of the test alone.
pub(crate) fn lines_with(part: &str) -> Vec<String> {
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    let lines = String::from_utf8_lossy(&lines);
    lines.lines().filter(|line| line.contains(part)).map(str::to_owned).collect()
}

struct Lines;

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LINES.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}
