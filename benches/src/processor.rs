//! Processor time, which tells what something costs on a machine that also does other things. Linux only.

use std::{fs, time::Duration};

use crate::{database::Server, measure::Result};

const TICK: Duration = Duration::from_millis(10);

/// Counts what this process and the database use from its start on.
pub(crate) struct Meter<'a> {
    server: &'a Server,
    app: Duration,
    database: Duration,
}

/// Microseconds of processor time for each of many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) app: f64,
    pub(crate) database: f64,
}

impl<'a> Meter<'a> {
    pub(crate) async fn start(server: &'a Server) -> Result<Self> {
        Ok(Self { server, app: used_by("self")?, database: server.processor_time().await? })
    }

    pub(crate) async fn for_each_of(self, number: usize) -> Result<Cost> {
        let each = |used: Duration| used.as_secs_f64() * 1e6 / number as f64;
        let (app, database) = (used_by("self")?, self.server.processor_time().await?);
        Ok(Cost { app: each(app - self.app), database: each(database.saturating_sub(self.database)) })
    }
}

/// How much a process has used so far.
pub(crate) fn used_by(process: &str) -> Result<Duration> {
    Ok(ticks(&fields(process)?, 11))
}

/// How much all children of a process have used so far.
pub(crate) fn used_by_children(parent: &str) -> Result<Duration> {
    let mut used = Duration::ZERO;
    for process in fs::read_dir("/proc")? {
        let process = process?.file_name().to_string_lossy().into_owned();
        // What ends meanwhile is counted by its parent.
        if let Ok(fields) = fields(&process)
            && fields.get(1).is_some_and(|id| id == parent)
        {
            used += ticks(&fields, 11);
        }
    }
    Ok(used + ticks(&fields(parent)?, 13))
}

/// Two times: in the process and in the kernel.
fn ticks(fields: &[String], first: usize) -> Duration {
    TICK * fields.iter().skip(first).take(2).filter_map(|field| field.parse::<u32>().ok()).sum()
}

pub(crate) fn parent(process: &str) -> Result<String> {
    Ok(fields(process)?.into_iter().nth(1).ok_or("unknown format")?)
}

/// What /proc says about a process, from its state on.
fn fields(process: &str) -> Result<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').ok_or("unknown format")?;
    Ok(fields.split_whitespace().map(str::to_owned).collect())
}
