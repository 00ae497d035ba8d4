//! Finds statements that begin or end a transaction. Through [`Tx`](super::Tx) they would end the request's own behind
//! the back of everybody who counts on it.

use sea_orm::DbBackend;

/// The first such statement of `sql`, by its name. Looks at the first word and for a semicolon; only if there is one, at
/// all of it.
pub(super) fn transaction_control(sql: &str, backend: DbBackend) -> Option<&'static str> {
    let mut rest = Text { bytes: sql.as_bytes(), at: 0, backend };
    rest.skip_blank();
    let found = rest.control();
    if found.is_some() || !sql.as_bytes().contains(&b';') {
        return found;
    }
    // Inside of the body of a trigger or function, whose END is none of a transaction.
    let mut body = false;
    loop {
        let create = rest.next_is("create");
        let begins = rest.skip_statement()?;
        body = body || (create && begins);
        rest.skip_blank();
        if body && rest.next_is("end") {
            body = false;
            continue;
        }
        if let Some(found) = rest.control() {
            return Some(found);
        }
    }
}

/// SQL that is read from left to right.
#[derive(Clone)]
struct Text<'a> {
    bytes: &'a [u8],
    at: usize,
    backend: DbBackend,
}

impl<'a> Text<'a> {
    fn peek(&self, ahead: usize) -> u8 {
        self.bytes.get(self.at + ahead).copied().unwrap_or(b' ')
    }

    fn is_over(&self) -> bool {
        self.at >= self.bytes.len()
    }

    /// The statement that begins here, if it is one of a transaction.
    fn control(&self) -> Option<&'static str> {
        // Most statements are told apart by their first letter.
        if !matches!(self.peek(0).to_ascii_lowercase(), b'a' | b'b' | b'c' | b'e' | b'p' | b'r' | b's') {
            return None;
        }
        let mut text = self.clone();
        let first = text.word();
        for name in ["ABORT", "BEGIN", "COMMIT", "END", "RELEASE", "ROLLBACK", "SAVEPOINT"] {
            if first.eq_ignore_ascii_case(name.as_bytes()) {
                return Some(name);
            }
        }
        for (name, words) in [
            ("START TRANSACTION", &["start", "transaction"][..]),
            ("PREPARE TRANSACTION", &["prepare", "transaction"]),
            ("SET SESSION CHARACTERISTICS", &["set", "session", "characteristics"]),
        ] {
            let mut text = self.clone();
            let all = words.iter().all(|word| {
                let found = text.word().eq_ignore_ascii_case(word.as_bytes());
                text.skip_blank();
                found
            });
            if all {
                return Some(name);
            }
        }
        None
    }

    fn next_is(&self, word: &str) -> bool {
        self.clone().word().eq_ignore_ascii_case(word.as_bytes())
    }

    fn word(&mut self) -> &'a [u8] {
        let start = self.at;
        while !self.is_over() && is_word(self.peek(0)) {
            self.at += 1;
        }
        &self.bytes[start..self.at]
    }

    /// White space, comments, and the mark at the beginning of a file.
    fn skip_blank(&mut self) {
        while !self.is_over() {
            match (self.peek(0), self.peek(1)) {
                (b'-', b'-') => self.skip_past(b"\n"),
                (b'/', b'*') => self.skip_comment(),
                (b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c | b';' | 0xef | 0xbb | 0xbf, _) => self.at += 1,
                _ => return,
            }
        }
    }

    /// Up to the next statement; `None` at the end. Says whether the word BEGIN was in this one.
    fn skip_statement(&mut self) -> Option<bool> {
        let mut begins = false;
        let sqlite = self.backend == DbBackend::Sqlite;
        while !self.is_over() {
            match (self.peek(0), self.peek(1)) {
                (b';', _) => return Some(begins),
                (b'-', b'-') => self.skip_past(b"\n"),
                (b'/', b'*') => self.skip_comment(),
                (quote @ (b'\'' | b'"'), _) => self.skip_quoted(quote, false),
                (b'`', _) if sqlite => self.skip_quoted(b'`', false),
                (b'[', _) if sqlite => self.skip_quoted(b']', false),
                (b'e' | b'E', b'\'') if !sqlite => {
                    self.at += 1;
                    self.skip_quoted(b'\'', true);
                }
                (b'$', _) if !sqlite => self.skip_dollars(),
                (byte, _) if is_word(byte) => begins |= self.word().eq_ignore_ascii_case(b"begin"),
                _ => self.at += 1,
            }
        }
        None
    }

    /// A quote that is doubled ends one text and begins the next, which is as good.
    fn skip_quoted(&mut self, end: u8, escapes: bool) {
        self.at += 1;
        while !self.is_over() && self.peek(0) != end {
            self.at += if escapes && self.peek(0) == b'\\' { 2 } else { 1 };
        }
        self.at += 1;
    }

    /// `$$ … $$` and `$name$ … $name$`; also a single `$`.
    fn skip_dollars(&mut self) {
        let start = self.at;
        self.at += 1;
        self.word();
        if self.peek(0) == b'$' && !self.bytes.get(start + 1).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
            self.skip_past(&self.bytes[start..self.at]);
        }
    }

    /// PostgreSQL nests comments, SQLite does not.
    fn skip_comment(&mut self) {
        self.at += 2;
        let mut depth = 1;
        while depth > 0 && !self.is_over() {
            match (self.peek(0), self.peek(1)) {
                (b'*', b'/') => (self.at, depth) = (self.at + 2, depth - 1),
                (b'/', b'*') if self.backend != DbBackend::Sqlite => (self.at, depth) = (self.at + 2, depth + 1),
                _ => self.at += 1,
            }
        }
    }

    fn skip_past(&mut self, end: &[u8]) {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let found = rest.windows(end.len()).position(|window| window == end);
        self.at = found.map_or(self.bytes.len(), |index| self.at + index + end.len());
    }
}

/// Not the dollar, which both databases take in a name: it begins a text in PostgreSQL.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [DbBackend; 2] = [DbBackend::Sqlite, DbBackend::Postgres];

    #[test]
    fn statements_of_a_transaction_are_found_wherever_they_stand() {
        for (sql, found) in [
            ("commit", "COMMIT"),
            ("  \n\tCoMmIt;", "COMMIT"),
            ("\u{feff}commit", "COMMIT"),
            ("commit-- now", "COMMIT"),
            ("commit/* now */", "COMMIT"),
            ("/* a; b */ -- select 1\n rollback", "ROLLBACK"),
            ("rollback to savepoint a", "ROLLBACK"),
            ("rollback prepared 'a'", "ROLLBACK"),
            ("BEGIN IMMEDIATE", "BEGIN"),
            ("start /* the */ transaction read only", "START TRANSACTION"),
            ("savepoint a", "SAVEPOINT"),
            ("release a", "RELEASE"),
            ("end", "END"),
            ("abort", "ABORT"),
            ("prepare transaction 'a'", "PREPARE TRANSACTION"),
            ("set session characteristics as transaction read only", "SET SESSION CHARACTERISTICS"),
            (";;commit", "COMMIT"),
            ("select 1; commit", "COMMIT"),
            ("select ';'; /* ; */ -- ;\n commit", "COMMIT"),
            ("select '\\'; commit", "COMMIT"),
            ("select 'it''s; ' ; commit", "COMMIT"),
            ("select \"a;b\"; end transaction", "END"),
            ("create table a (b int); end", "END"),
            ("insert into a values ('x'); rollback; insert into a values ('y')", "ROLLBACK"),
        ] {
            for backend in BOTH {
                assert_eq!(transaction_control(sql, backend), Some(found), "{sql}");
            }
        }
    }

    #[test]
    fn other_statements_are_none() {
        for sql in [
            "",
            "-- commit",
            "/* commit",
            "select 'a; commit'",
            "select 1; select 'a; commit; '",
            "select \"a; commit\"; ",
            "select a.commit from a; select rollback from b",
            "insert into commits values (1)",
            "beginning",
            "set local search_path = a; set transaction_timeout = 0",
            "set session authorization a",
            "start_values",
            "prepare a as select 1",
            "explain select 1",
            "create trigger a after insert on b begin insert into c values (1); select 2; end;",
            "create trigger a after insert on b begin select case when 1 then 2 end; end; insert into c values (1);",
            "create function a() returns int begin atomic select 1; end; select a()",
        ] {
            for backend in BOTH {
                assert_eq!(transaction_control(sql, backend), None, "{sql}");
            }
        }
    }

    #[test]
    fn each_database_has_its_own_quotes_and_comments() {
        for (sql, sqlite, postgres) in [
            ("/* /* */ commit", Some("COMMIT"), None),
            ("/* /* */ */ commit", None, Some("COMMIT")),
            ("select [a;commit;b]; ", None, Some("COMMIT")),
            ("select `a;commit;b`; ", None, Some("COMMIT")),
            ("do $$ begin; commit; end $$", Some("COMMIT"), None),
            ("do $a$ $$; commit; $a$; select $1", Some("COMMIT"), None),
            ("do $a$ $a$; commit", Some("COMMIT"), Some("COMMIT")),
            ("select E'a\\'; commit; '", Some("COMMIT"), None),
            ("create trigger a begin select 1; end; commit", Some("COMMIT"), Some("COMMIT")),
        ] {
            assert_eq!(transaction_control(sql, DbBackend::Sqlite), sqlite, "{sql}");
            assert_eq!(transaction_control(sql, DbBackend::Postgres), postgres, "{sql}");
        }
    }
}
