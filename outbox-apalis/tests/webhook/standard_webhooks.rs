//! Verifies with the official Python package of Standard Webhooks, which shares no code with ours.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::LazyLock,
};

use serde_json::json;

use crate::fixture::Received;

const PACKAGE: &str = "standardwebhooks";
const VERSION: &str = "1.1.0";

const VERIFY: &str = r#"
import json, sys
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

def verifies(case):
    try:
        Webhook(case["secret"]).verify(case["body"], case["headers"])
        return True
    except WebhookVerificationError:
        return False

print(json.dumps([verifies(case) for case in json.load(sys.stdin)]))
"#;

/// Installed once below the target directory.
static INSTALLED: LazyLock<PathBuf> = LazyLock::new(|| {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let installed = home.join(format!("{PACKAGE}-{VERSION}"));
    if !installed.exists() {
        let unfinished = home.join(format!("{PACKAGE}-{VERSION}-{}", std::process::id()));
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target"]);
        let output = pip.arg(&unfinished).arg(format!("{PACKAGE}=={VERSION}")).output();
        let why = output.map_or_else(|error| error.to_string(), |output| failed(&output).unwrap_or_default());
        // Another run of the tests may have been faster.
        let moved = std::fs::rename(&unfinished, &installed).is_ok() || installed.exists();
        assert!(moved, "signatures are not verified, for `pip install {PACKAGE}=={VERSION}` failed: {why}");
    }
    installed
});

/// Whether the receiver of each request, who knows this secret, believes that it is genuine.
pub(crate) fn verified(cases: &[(&Received, &str)]) -> Vec<bool> {
    let cases = cases.iter().map(|(received, secret)| {
        let headers: serde_json::Map<_, _> =
            received.headers.iter().map(|(name, value)| (name.to_string(), json!(value.to_str().unwrap()))).collect();
        json!({ "secret": secret, "headers": headers, "body": std::str::from_utf8(&received.body).unwrap() })
    });
    let cases = serde_json::Value::Array(cases.collect());
    let mut python = Command::new("python3");
    python.arg("-c").arg(VERIFY).env("PYTHONPATH", &*INSTALLED);
    let mut python = python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    python.stdin.take().unwrap().write_all(cases.to_string().as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert_eq!(failed(&output), None);
    serde_json::from_slice(&output.stdout).unwrap()
}

fn failed(output: &Output) -> Option<String> {
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}
