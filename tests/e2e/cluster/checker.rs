//! Dovecot's programs under a checker of memory, if DOVETAIL_TEST_CHECKER names one: `make test-asan`, `make test-valgrind`.
//!
//! What that finds goes into files below the server's folder, and each test looks there at its end.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use super::Version;

/// The programs that load the plugin, in Dovecot's folder, which scripts start under valgrind. Not all are there in each release.
const PROGRAMS: [&str; 7] = ["imap", "pop3", "lmtp", "dovecot-lda", "doveadm-server", "indexer-worker", "dovetail"];
/// Where they are instead.
const MOVED: &str = "checked";
/// What the checker found, below the server's folder.
const FOUND: &str = "found";

#[derive(Clone, Debug)]
pub enum Checker {
    /// AddressSanitizer and UndefinedBehaviorSanitizer: the plugin is a build that has them, the first one's library comes first.
    Asan {
        library: String,
    },
    Valgrind {
        suppressions: String,
    },
}

impl Checker {
    /// The one that is asked for.
    pub fn get() -> Option<&'static Checker> {
        static CHECKER: OnceLock<Option<Checker>> = OnceLock::new();
        let find = || match std::env::var("DOVETAIL_TEST_CHECKER").unwrap_or_default().as_str() {
            "" => None,
            "asan" => {
                let output = Command::new("gcc").arg("-print-file-name=libasan.so").output().expect("gcc");
                let named = String::from_utf8(output.stdout).expect("a path");
                let library = fs::canonicalize(named.trim()).unwrap_or_else(|e| panic!("{named}: {e}"));
                Some(Checker::Asan { library: library.display().to_string() })
            }
            "valgrind" => {
                let suppressions = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/valgrind.supp");
                Some(Checker::Valgrind { suppressions: suppressions.display().to_string() })
            }
            other => panic!("DOVETAIL_TEST_CHECKER: {other}?"),
        };
        CHECKER.get_or_init(find).as_ref()
    }

    /// The build of the plugin that it needs, behind the name of the stage.
    pub fn build(&self) -> Option<&'static str> {
        match self {
            Checker::Asan { .. } => Some("-asan"),
            Checker::Valgrind { .. } => None,
        }
    }

    /// So many times as long as without it everything may take.
    pub fn slowness(&self) -> u32 {
        match self {
            Checker::Asan { .. } => 3,
            Checker::Valgrind { .. } => 6,
        }
    }

    /// So many bytes of what a process has freed it may keep, with what is noted of them.
    pub fn kept_bytes(&self) -> u64 {
        match self {
            Checker::Asan { .. } => 64 << 20,
            // Not measured: no such test runs with it.
            Checker::Valgrind { .. } => 0,
        }
    }

    /// Makes the folder for what is found. Of valgrind, also replaces the programs in `lib`, a copy of Dovecot's folder that covers
    /// the one at `pkglibdir`; `dir` is the server's folder as it sees it itself.
    pub fn prepare(&self, lib: &Path, pkglibdir: &str, dir: &str, outside: &Path) {
        let found = outside.join(FOUND);
        fs::create_dir(&found).expect("mkdir");
        fs::set_permissions(&found, PermissionsExt::from_mode(0o1777)).expect("chmod");
        let Checker::Valgrind { suppressions } = self else { return };
        fs::create_dir(lib.join(MOVED)).expect("mkdir");
        for name in PROGRAMS.iter().filter(|name| lib.join(name).exists()) {
            fs::rename(lib.join(name), lib.join(MOVED).join(name)).expect("rename");
            let script = format!(
                "#!/bin/sh\nexec valgrind --quiet --vgdb=no --log-file={dir}/{FOUND}/{name}.%p --suppressions={suppressions} \
                 --child-silent-after-fork=yes {pkglibdir}/{MOVED}/{name} \"$@\"\n"
            );
            fs::write(lib.join(name), script).expect("a script");
            fs::set_permissions(lib.join(name), PermissionsExt::from_mode(0o755)).expect("chmod");
        }
    }

    /// What the sanitizers want in the environment. Dovecot does not free what is there until a process ends: that is no leak. And
    /// it calls stat(NULL) for an index in memory: so strings are not checked beyond what is read of them. Each process keeps the last
    /// 16 MB that it freed, not 256: many run at once.
    pub fn environment(&self, dir: &str) -> Vec<(&'static str, String)> {
        let Checker::Asan { library } = self else { return Vec::new() };
        let found = format!("log_path={dir}/{FOUND}/sanitizer");
        vec![
            ("LD_PRELOAD", library.clone()),
            ("ASAN_OPTIONS", format!("{found}:detect_leaks=0:detect_stack_use_after_return=1:quarantine_size_mb=16")),
            ("UBSAN_OPTIONS", format!("{found}:print_stacktrace=1")),
        ]
    }

    /// Of Dovecot. Checkers need more memory than they use.
    pub fn settings(&self, version: Version, dir: &str) -> String {
        let environment = self.environment(dir);
        let all = |separator: &str| -> Vec<String> {
            environment.iter().map(|(name, value)| format!("{name}{separator}{value}")).collect()
        };
        match version {
            Version::V23 => format!(
                "default_vsz_limit = 0\nservice dovetail {{\n  vsz_limit = 0\n}}\n\
                 import_environment = $import_environment {}\n",
                all("=").join(" ")
            ),
            Version::V24 => format!(
                "default_vsz_limit = unlimited\nservice dovetail {{\n  vsz_limit = unlimited\n}}\n\
                 import_environment {{\n{}\n}}\n",
                all(" = ").join("\n")
            ),
        }
    }
}

/// What a checker has found in the processes of the server with this folder.
pub fn findings(outside: &Path) -> Vec<String> {
    let Ok(files) = fs::read_dir(outside.join(FOUND)) else { return Vec::new() };
    let text = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    files.flatten().map(|file| text(&file.path())).filter(|text| !text.is_empty()).collect()
}
