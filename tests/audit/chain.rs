//! The log's chain: across rotations, under every kind of tampering, killed writers, full disks.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use pgtandem::chain::{
    Chain, Follower, Fsync, HeadFile, Kept, MacKey, Options, Verification, events, files, lines, verify, verify_against,
};
use pgtandem::config::LoggedValues;
use pgtandem::shadow::{MismatchLog, ValueWriter};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

struct Log {
    directory: TempDir,
    options: Options,
}

impl Log {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = Options {
            path: directory.path().join("mismatches.jsonl"),
            max_bytes: 1 << 20,
            max_age: Duration::from_secs(3600),
            fsync: Fsync::Never,
            mac_key: None,
        };
        Self { directory, options }
    }

    fn open(&self) -> Chain {
        Chain::open(self.options.clone(), Map::new()).unwrap()
    }

    fn write(&self, count: u32) {
        let mut chain = self.open();
        for n in 0..count {
            chain.append("mismatch", keys(n)).unwrap();
        }
    }

    fn path(&self) -> &Path {
        &self.options.path
    }

    fn verify(&self) -> Verification {
        verify(self.path(), self.options.mac_key.as_ref()).unwrap()
    }

    fn events(&self) -> Vec<Value> {
        lines(self.path(), None)
            .unwrap()
            .map(|line| serde_json::from_slice(&line.unwrap().bytes).unwrap())
            .collect()
    }

    fn event(&self, name: &str) -> Value {
        self.events().into_iter().rfind(|event| event["event"] == name).unwrap()
    }

    /// Where the chain breaks, once a file's text has been altered.
    fn altered(&self, file: &Path, alter: impl FnOnce(Vec<String>) -> Vec<String>) -> Vec<String> {
        let text = fs::read_to_string(file).unwrap();
        let altered = alter(text.lines().map(str::to_owned).collect());
        fs::write(file, altered.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        let verified = self.verify();
        fs::write(file, text).unwrap();
        assert_eq!(verified.intact, verified.broken.is_empty());
        verified
            .broken
            .iter()
            .map(|broken| format!("{}:{}: {}", broken.file, broken.line, broken.what))
            .collect()
    }
}

fn keys(n: u32) -> Map<String, Value> {
    let Value::Object(map) = json!({ "n": n, "text": "some 100 bytes, so that a few lines fill a file ".repeat(2) })
    else {
        unreachable!()
    };
    map
}

#[test]
fn a_chain_goes_on_across_files_and_openings() {
    let mut log = Log::new();
    log.options.max_bytes = 2000;
    log.write(20);
    log.write(5);
    let found = files(log.path()).unwrap();
    assert!(found.len() > 3, "{found:?}");
    for file in &found {
        assert!(fs::metadata(file).unwrap().len() <= 2000);
    }
    let verified = log.verify();
    assert!(verified.intact, "{verified}");
    // Two of them tell of the openings.
    assert_eq!((verified.lines, verified.head.seq), (27, 27));
    assert_eq!(verified.head_file, HeadFile::Agrees);
    assert_eq!(log.open().head().seq, 28);
}

#[test]
fn a_file_is_rotated_when_it_is_old() {
    let mut log = Log::new();
    log.options.max_age = Duration::from_millis(1);
    let mut chain = log.open();
    for n in 0..3 {
        std::thread::sleep(Duration::from_millis(2));
        chain.append("mismatch", keys(n)).unwrap();
    }
    assert_eq!(files(log.path()).unwrap().len(), 4);
    assert!(log.verify().intact);
}

#[test]
fn every_alteration_is_found_where_it_is() {
    let mut log = Log::new();
    log.options.max_bytes = 2000;
    log.write(20);
    let found = files(log.path()).unwrap();
    let (old, current) = (&found[1], log.path());
    let first = fs::read_to_string(old).unwrap();
    let first: Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
    let first = first["seq"].as_u64().unwrap();
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();

    let broken = log.altered(old, |mut lines| {
        lines[2] = lines[2].replacen("\"n\":", "\"n\":9", 1);
        lines
    });
    assert_eq!(
        broken,
        [format!(
            "{}:4: line number {} does not carry the hash of number {}: one of the two was changed",
            name(old),
            first + 3,
            first + 2
        )]
    );
    let removed = log.altered(old, |mut lines| {
        lines.remove(2);
        lines
    });
    assert_eq!(
        removed,
        [format!(
            "{}:3: line number {} follows number {}: lines were removed, repeated or put elsewhere",
            name(old),
            first + 3,
            first + 1
        )]
    );
    let swapped = log.altered(old, |mut lines| {
        lines.swap(1, 2);
        lines
    });
    assert_eq!(swapped.len(), 3, "{swapped:?}");
    let inserted = log.altered(old, |mut lines| {
        lines.insert(2, lines[2].clone());
        lines
    });
    assert_eq!(inserted.len(), 1, "{inserted:?}");
    let unreadable = log.altered(old, |mut lines| {
        lines[1] = "{}".into();
        lines
    });
    assert!(unreadable[0].contains(":2: is no line of a chain"), "{unreadable:?}");
    // The end has no successor to betray it: the file beside the log does, or a report's head.
    let cut = log.altered(current, |mut lines| {
        lines.pop();
        lines
    });
    assert!(cut[0].contains("lines are missing at the end"), "{cut:?}");
    let last = log.altered(current, |mut lines| {
        let line = lines.pop().unwrap();
        lines.push(line.replacen("\"n\":", "\"n\":9", 1));
        lines
    });
    assert!(
        last[0].contains("is another one than the file beside the log knows"),
        "{last:?}"
    );

    fs::rename(&found[0], log.directory.path().join("elsewhere")).unwrap();
    let verified = log.verify();
    assert!(
        verified.broken[0].what.contains("what was before it is not here"),
        "{verified}"
    );
    fs::rename(log.directory.path().join("elsewhere"), &found[0]).unwrap();
    fs::rename(old, log.directory.path().join("elsewhere")).unwrap();
    assert_eq!(log.verify().broken.len(), 1);
    fs::rename(log.directory.path().join("elsewhere"), old).unwrap();
    assert!(log.verify().intact);
}

#[test]
fn rotated_files_that_changed_places_are_found() {
    let mut log = Log::new();
    log.options.max_bytes = 2000;
    log.write(20);
    let found = files(log.path()).unwrap();
    let (one, other) = (fs::read(&found[0]).unwrap(), fs::read(&found[1]).unwrap());
    fs::write(&found[0], other).unwrap();
    fs::write(&found[1], one).unwrap();
    let verified = log.verify();
    assert!(verified.broken.len() >= 3, "{verified}");
    assert!(verified.broken[0].what.contains("the chain begins with"), "{verified}");
}

/// Whoever cuts the end off and says the same in the file beside the log leaves a chain that is whole:
/// only a head that was kept elsewhere betrays it, then and after the next start.
#[test]
fn an_end_that_was_cut_off_is_found_by_a_head_that_was_kept() {
    let mut log = Log::new();
    log.options.max_bytes = 2000;
    log.write(20);
    let kept = log.verify().head;
    let against = |log: &Log, hash: &str| verify_against(log.path(), None, Some(hash)).unwrap();
    assert_eq!(against(&log, &kept.hash).kept, Some(Kept::Line(kept.seq)));
    log.write(3);
    let later = against(&log, &kept.hash);
    assert!(later.intact && later.kept == Some(Kept::Line(kept.seq)), "{later}");

    // Old files were archived elsewhere: the rest goes on from the head of a report of that time.
    let oldest = files(log.path()).unwrap().remove(0);
    let text = fs::read_to_string(&oldest).unwrap();
    let of_that_time = pgtandem::chain::sha256(text.lines().last().unwrap().as_bytes());
    fs::remove_file(&oldest).unwrap();
    assert!(!log.verify().intact);
    let rest = against(&log, &of_that_time);
    assert!(rest.intact && rest.kept == Some(Kept::BeforeTheFirst), "{rest}");
    assert!(!against(&log, &"5f".repeat(32)).intact);
    fs::write(&oldest, text).unwrap();

    let newest = log.verify().head;
    let text = fs::read_to_string(log.path()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let (last, rest) = lines.split_last().unwrap();
    assert!(last.contains(&format!("\"seq\":{}", newest.seq)));
    fs::write(
        log.path(),
        rest.iter().map(|line| format!("{line}\n")).collect::<String>(),
    )
    .unwrap();
    let cut = match rest.last() {
        Some(line) => json!({ "seq": newest.seq - 1, "hash": pgtandem::chain::sha256(line.as_bytes()) }),
        None => panic!("the file had one line"),
    };
    fs::write(log.directory.path().join("mismatches.jsonl.head"), cut.to_string()).unwrap();
    assert!(log.verify().intact, "the chain alone cannot know");
    let found = against(&log, &newest.hash);
    assert!(!found.intact && found.kept == Some(Kept::Missing), "{found}");
    log.write(1);
    assert!(log.verify().intact);
    assert_eq!(against(&log, &newest.hash).kept, Some(Kept::Missing));
}

/// Killed after the file was renamed, before or after the new one was made.
#[test]
fn a_kill_in_the_middle_of_a_rotation_breaks_nothing() {
    for made in [false, true] {
        let log = Log::new();
        log.write(3);
        let rotated = log.directory.path().join("mismatches.jsonl.000000000001");
        fs::rename(log.path(), &rotated).unwrap();
        if made {
            fs::write(log.path(), "").unwrap();
        }
        let before = log.verify();
        assert!(before.intact && before.lines == 4, "{before}");
        log.write(2);
        let after = log.verify();
        assert!(
            after.intact && after.lines == 7 && after.incidents.is_empty(),
            "{after}"
        );
    }
}

#[test]
fn a_clock_that_went_back_breaks_nothing_and_is_told() {
    let log = Log::new();
    // As a writer left it whose clock was a year ahead.
    let line = |seq: u64, prev: &str| {
        json!({ "version": 2, "seq": seq, "time": "2999-01-02T03:04:05.6Z", "event": "mismatch", "prev": prev })
            .to_string()
    };
    let first = line(1, &"0".repeat(64));
    let second = line(2, &pgtandem::chain::sha256(first.as_bytes()));
    fs::write(log.path(), format!("{first}\n{second}\n")).unwrap();
    log.write(2);
    let verified = log.verify();
    assert!(verified.intact && verified.lines == 5, "{verified}");
    let told: Vec<_> = verified
        .incidents
        .iter()
        .map(|one| (one.seq, one.event.as_str()))
        .collect();
    assert_eq!(told, [(3, "clock_went_back")]);
}

#[test]
fn a_mac_finds_a_chain_that_was_written_anew() {
    let mut log = Log::new();
    log.write(3);
    // Whoever may write the files makes a chain that looks right…
    assert!(log.verify().intact);
    log.options.mac_key = Some(MacKey::new(b"only the auditor has it"));
    log.write(3);
    let signed = log.verify();
    assert!(signed.intact, "{signed}");
    // …but signs nothing.
    assert_eq!((signed.lines, signed.signed), (8, 4));
    let forged = log.options.clone();
    log.options.mac_key = Some(MacKey::new(b"another"));
    log.write(1);
    log.options = forged;
    let verified = log.verify();
    assert_eq!(verified.broken.len(), 2, "{verified}");
    assert!(verified.broken[0].what.contains("its MAC is wrong"));
    log.options.mac_key = None;
    log.write(1);
    log.options.mac_key = Some(MacKey::new(b"only the auditor has it"));
    let verified = log.verify();
    assert!(
        verified
            .broken
            .iter()
            .any(|broken| broken.what.contains("carries no MAC")),
        "{verified}"
    );
}

#[test]
fn one_writer_at_a_time() {
    let log = Log::new();
    let chain = log.open();
    let second = Chain::open(log.options.clone(), Map::new()).err().unwrap();
    assert!(second.to_string().contains("another process"), "{second}");
    drop(chain);
    log.open();
}

#[test]
fn a_torn_last_line_is_set_aside_and_recorded() {
    let log = Log::new();
    log.write(3);
    let torn = "{\"version\":2,\"seq\":5,\"ti";
    let mut file = fs::OpenOptions::new().append(true).open(log.path()).unwrap();
    file.write_all(torn.as_bytes()).unwrap();
    let before = log.verify();
    assert!(before.intact && before.torn_bytes == torn.len() as u64, "{before}");

    log.write(1);
    let verified = log.verify();
    assert!(verified.intact && verified.torn_bytes == 0, "{verified}");
    assert_eq!((verified.lines, verified.incidents.len()), (7, 1));
    let recorded = log.event(events::TORN);
    assert_eq!(recorded["bytes"], torn.len());
    let kept = log.directory.path().join(recorded["kept_in"].as_str().unwrap());
    assert_eq!(fs::read_to_string(kept).unwrap(), torn);
}

/// Wherever a crash of the machine has cut the last line off.
#[test]
fn a_line_may_end_anywhere() {
    let log = Log::new();
    log.write(2);
    let whole = fs::read(log.path()).unwrap();
    let head = fs::read(log.directory.path().join("mismatches.jsonl.head")).unwrap();
    let last = whole[..whole.len() - 1]
        .iter()
        .rposition(|&byte| byte == b'\n')
        .unwrap()
        + 1;
    for end in last..whole.len() {
        fs::write(log.path(), &whole[..end]).unwrap();
        fs::write(log.directory.path().join("mismatches.jsonl.head"), &head).unwrap();
        // Until a writer has looked at it: the file beside the log knows of a line that is not there.
        let before = log.verify();
        assert_eq!(
            (before.head_file, before.torn_bytes),
            (HeadFile::Ahead, (end - last) as u64),
            "{end}: {before}"
        );

        log.write(1);
        let after = log.verify();
        assert!(after.intact && after.torn_bytes == 0, "{end}: {after}");
        // The line is gone, and the chain says so: what is left of it is kept, or nothing was.
        let told: Vec<_> = after.incidents.iter().map(|incident| incident.event.as_str()).collect();
        let expected: &[&str] = match end - last {
            0 => &[events::LINES_MISSING],
            _ => &[events::TORN, events::LINES_MISSING],
        };
        assert!(expected.iter().all(|event| told.contains(event)), "{end}: {told:?}");
    }
}

#[test]
fn lines_that_went_missing_are_recorded_at_the_next_start() {
    let log = Log::new();
    log.write(3);
    let text = fs::read_to_string(log.path()).unwrap();
    let kept: String = text.lines().take(2).map(|line| format!("{line}\n")).collect();
    fs::write(log.path(), kept).unwrap();
    log.write(1);
    let recorded = log.event(events::LINES_MISSING);
    assert_eq!(
        (&recorded["expected"]["seq"], &recorded["found"]["seq"]),
        (&json!(4), &json!(2))
    );
    // From here on the chain is whole; what happened before is a part of it.
    let verified = log.verify();
    assert!(verified.intact && verified.incidents.len() == 1, "{verified}");
}

#[test]
fn a_file_that_is_no_chain_is_set_aside_whole() {
    let log = Log::new();
    fs::write(log.path(), "{\"version\":1,\"kind\":\"value\"}\n").unwrap();
    log.write(1);
    let recorded = log.event(events::SET_ASIDE);
    let kept = log.directory.path().join(recorded["kept_in"].as_str().unwrap());
    assert_eq!(
        fs::read_to_string(kept).unwrap(),
        "{\"version\":1,\"kind\":\"value\"}\n"
    );
    assert!(log.verify().intact);
}

#[test]
fn lines_are_followed_across_rotations() {
    let mut log = Log::new();
    log.options.max_bytes = 1000;
    let mut chain = log.open();
    let mut follower = Follower::from_end(log.path()).unwrap();
    let mut seen = Vec::new();
    for n in 0..12 {
        chain.append("mismatch", keys(n)).unwrap();
        if n % 3 == 0 {
            seen.extend(follower.ready().unwrap());
        }
    }
    seen.extend(follower.ready().unwrap());
    let numbers: Vec<Value> = seen
        .iter()
        .map(|line| serde_json::from_slice::<Value>(line).unwrap()["n"].clone())
        .collect();
    assert_eq!(Value::from(numbers), json!((0..12).collect::<Vec<_>>()));
}

/// A process that writes as a proxy does; the test's other half.
struct Writer {
    process: Child,
    said: BufReader<ChildStdout>,
}

const LOG: &str = "PGTANDEM_TEST_LOG";

impl Writer {
    /// `limit`: how long a file it may write, in KiB.
    fn start(path: &Path, limit: Option<u64>) -> Self {
        let limit = limit.map_or_else(String::new, |limit| format!("trap '' XFSZ; ulimit -S -f {limit}; "));
        let mut process = Command::new("bash")
            .arg("-c")
            .arg(format!("{limit}exec \"$0\" \"$@\""))
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "chain::writes_until_it_is_killed",
                "--ignored",
                "--nocapture",
            ])
            .env(LOG, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(process.stdout.take().unwrap());
        Self { process, said }
    }

    /// The next line that begins so, without that.
    fn says(&mut self, beginning: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.said.read_line(&mut line).unwrap(), 0, "the writer ended");
            if let Some(rest) = line.trim_end().strip_prefix(beginning) {
                return rest.to_owned();
            }
        }
    }

    fn kill(mut self) -> Vec<u64> {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).unwrap();
        rest.lines()
            .filter_map(|line| line.strip_prefix("written ")?.parse().ok())
            .collect()
    }
}

#[tokio::test]
#[ignore = "the process that other tests start and kill"]
#[allow(clippy::print_stdout, reason = "they read it")]
async fn writes_until_it_is_killed() {
    let path = PathBuf::from(std::env::var_os(LOG).unwrap());
    let options = Options {
        max_bytes: 1 << 30,
        fsync: Fsync::Never,
        ..Options::from(path)
    };
    let (log, _writer) = MismatchLog::open(options, ValueWriter::new(LoggedValues::Hashed));
    println!();
    for n in 0.. {
        match log.record("mismatch", keys(n)).await {
            Ok(head) => println!("written {}", head.seq),
            Err(error) => {
                let status = log.status();
                println!("failed after {}: {error}", status.head.seq);
                assert!(status.failing.is_some() && status.lost > 0);
                // Goes on when it is told that there is room.
                std::io::stdin().read_exact(&mut [0]).unwrap();
            }
        }
    }
}

#[test]
fn a_killed_writer_loses_nothing_that_was_written() {
    let log = Log::new();
    let mut written = Vec::new();
    for turn in 0..4 {
        let mut writer = Writer::start(log.path(), None);
        for _ in 0..20 * (turn + 1) {
            written.push(writer.says("written ").parse().unwrap());
        }
        written.extend(writer.kill());
    }
    log.write(1);
    let verified = log.verify();
    assert!(verified.intact, "{verified}");
    assert!(written.len() >= 200);
    let there: Vec<u64> = log
        .events()
        .iter()
        .map(|event| event["seq"].as_u64().unwrap())
        .collect();
    assert!(written.iter().all(|seq| there.contains(seq)));
}

#[test]
fn a_full_disk_loses_lines_but_not_the_chain() {
    let log = Log::new();
    let mut writer = Writer::start(log.path(), Some(8));
    let failed = writer.says("failed after ");
    let verified = log.verify();
    assert!(verified.intact, "{failed}: {verified}");
    assert!(fs::metadata(log.path()).unwrap().len() <= 8192);
    // Still full: the second one is lost, too.
    writer.process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    writer.says("failed after ");
    let lifted = Command::new("prlimit")
        .args(["--fsize=unlimited:unlimited", "--pid", &writer.process.id().to_string()])
        .status()
        .unwrap();
    assert!(lifted.success());
    writer.process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    writer.says("written ");
    writer.kill();
    let opened = log
        .events()
        .into_iter()
        .find(|event| event["event"] == events::OPENED && event["lost_before"] != Value::Null)
        .unwrap();
    assert_eq!(opened["lost_before"], 2);
    assert!(log.verify().intact);
}
