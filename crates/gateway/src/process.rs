//! What this process takes of the system, for `/admin/status` and `/metrics`: the figures by which a leak is seen.

use serde::{Deserialize, Serialize};

/// Figures of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// Bytes in memory, what the pool has taken included.
    pub resident_bytes: u64,
    /// Of these, bytes that no file and no shared memory stands behind: heap and stacks. The pool is not among them.
    pub private_bytes: u64,
    /// Open files, sockets included.
    pub open_files: u64,
    /// Threads.
    pub threads: u64,
}

impl ProcessStatus {
    /// This process, now, whose pool has taken so much; `None` where the system has no `/proc` that says it.
    pub(crate) fn read(pool_taken_bytes: u64) -> Option<Self> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        // The directory is read through a descriptor of its own, which is not counted.
        let files = std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1);
        let status = Self::parse(&status)?;
        let private_bytes = status.private_bytes.saturating_sub(pool_taken_bytes);
        Some(ProcessStatus { open_files: files as u64, private_bytes, ..status })
    }

    /// Reads what `/proc/PID/status` says.
    fn parse(status: &str) -> Option<Self> {
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        Some(ProcessStatus {
            resident_bytes: number("VmRSS")? * 1024,
            private_bytes: number("RssAnon")? * 1024,
            open_files: 0,
            threads: number("Threads")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_says_it_in_kilobytes() {
        let text =
            "Name:\ttangram\nVmHWM:\t    9999 kB\nVmRSS:\t    2048 kB\nRssAnon:\t     512 kB\nThreads:\t7\n";
        let expected =
            ProcessStatus { resident_bytes: 2 << 20, private_bytes: 512 << 10, open_files: 0, threads: 7 };
        assert_eq!(ProcessStatus::parse(text), Some(expected));
        assert_eq!(ProcessStatus::parse("VmRSS:\t2048 kB\nThreads:\t7\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn an_open_file_is_counted() {
        let before = ProcessStatus::read(0).unwrap();
        assert!(before.private_bytes > 0 && before.private_bytes <= before.resident_bytes);
        // Other tests open and close files meanwhile; fifty are more than they do.
        let files: Vec<_> = (0..50).map(|_| std::fs::File::open("/proc/self/status").unwrap()).collect();
        assert!(ProcessStatus::read(0).unwrap().open_files > before.open_files + 25);
        drop(files);
    }
}
