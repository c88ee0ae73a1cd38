//! The compiled kernels: machine code for every GPU that is served, PTX for newer ones, compressed, in the driver's own
//! container. The driver takes from it what fits the GPU.
//!
//! Made by `scripts/cuda-kernels.sh`, never by the build. The test here proves that it was made from the sources that are
//! in this repository; `scripts/cuda-kernels.sh --check` compiles them again and compares.

/// The driver reads its header by words.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!("../../kernels/cuda.fatbin"));

/// What [`super::load`] loads.
pub static IMAGE: &[u8] = &ALIGNED.0;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use sha2::{Digest, Sha256};

    use super::IMAGE;

    const SUMS: &str = include_str!("../../kernels/cuda.sums");

    fn sum(bytes: &[u8]) -> String {
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_embedded_kernels_come_from_the_sources() {
        let mut sums: BTreeMap<&str, &str> = SUMS
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split_once("  ").expect("a hash and a name"))
            .map(|(sum, name)| (name, sum))
            .collect();
        assert_eq!(sums.remove("cuda.fatbin"), Some(&*sum(IMAGE)), "cuda.fatbin is not what cuda.sums says");
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        for file in folder.join("cuda").read_dir().expect("the sources") {
            let path = file.expect("a source").path();
            let name = format!("cuda/{}", path.file_name().expect("a name").to_string_lossy());
            let found = sum(&std::fs::read(&path).expect("a source"));
            let expected = sums.remove(&*name);
            assert_eq!(expected, Some(&*found), "{name} has changed: run scripts/cuda-kernels.sh");
        }
        assert!(sums.is_empty(), "sources are gone: {sums:?}");
    }

    #[test]
    fn the_embedded_kernels_are_a_container_of_moderate_size() {
        // The header of a fat binary, and its length.
        let header = |at: usize| u32::from_le_bytes(IMAGE[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(header(0), 0xba55_ed50);
        let length = u64::from(header(8)) | u64::from(header(12)) << 32;
        assert_eq!(length + 16, IMAGE.len() as u64);
        assert!(IMAGE.len() < 8 << 20, "{} bytes", IMAGE.len());
        assert_eq!(IMAGE.as_ptr() as usize % 16, 0);
    }
}
