//! Owns how the process treats memory: buffers are kept, what only the start needed is given back.
//! Called by `main` for the daemons.
//! Must never give back a page that was written to: it would come back as it is in the file.

use std::{fs, time::Duration};

/// How much freed memory is kept, bytes.
const KEPT: i32 = 4 << 20;
/// Smaller buffers than this come from the heap, bytes.
const LARGE: i32 = 1 << 20;
/// When the start is over, and when the first hour's odd jobs are.
const WHEN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// Buffers come and go with every message: given back to the kernel each time, they cost a page fault per 4 KiB.
pub fn keep_buffers() {
    // SAFETY: it sets numbers of the allocator, before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        // Nearly all work is one thread's: an arena for each of the others would hold on to pages for nothing.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives back the code that only the start ran, and whatever the kernel mapped around it: most of a small process. Never ends.
pub async fn forget_the_start() {
    for wait in WHEN {
        tokio::time::sleep(wait).await;
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        for (start, length) in code(&maps) {
            // SAFETY: the range is code of a file that is mapped privately and read-only: nothing is lost, what is needed again is read again.
            unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
        }
    }
    std::future::pending().await
}

/// The ranges that hold code of files, from the lines of `/proc/self/maps`: readable, executable, not writable, private.
fn code(maps: &str) -> Vec<(usize, usize)> {
    let range = |line: &str| {
        let mut words = line.split_whitespace();
        let (addresses, access, inode) = (words.next()?, words.next()?, words.nth(2)?);
        let (start, end) = addresses.split_once('-')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        (access == "r-xp" && inode != "0").then(|| (start, end.checked_sub(start)))
    };
    maps.lines().filter_map(range).filter_map(|(start, length)| Some((start, length?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_given_back() {
        let maps = "\
55d0c0000000-55d0c0001000 r--p 00000000 08:01 1234 /bin/x
55d0c0001000-55d0c0003000 r-xp 00001000 08:01 1234 /bin/x
55d0c0003000-55d0c0004000 rw-p 00003000 08:01 1234 /bin/x
55d0c0005000-55d0c0006000 rwxp 00003000 08:01 1234 /bin/x
7f0000000000-7f0000001000 r-xp 00000000 00:00 0
7fff00000000-7fff00002000 r-xp 00000000 00:00 0 [vdso]
";
        assert_eq!(code(maps), [(0x55d0_c000_1000, 0x2000)]);
        // This very process goes on after it.
        let own = fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!code(&own).is_empty());
    }
}
