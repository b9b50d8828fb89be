//! CUDA_EMULATOR_PTX=FOLDER: kernels from files in place of the program's own, so that a changed kernel can be tried
//! without building the program anew. A module takes the file that has the same kernels, by their names.
use std::collections::BTreeSet;
use std::path::Path;

use super::errors::*;
use super::note;

/// The text to load in place of `text`; `text` itself where the folder has none of its kernels.
pub fn replaced(folder: &Path, text: String) -> Outcome<String> {
    let refuse = |why: String| {
        note(&format!("CUDA_EMULATOR_PTX: {why}"));
        Error(CUDA_ERROR_INVALID_IMAGE)
    };
    let entries = std::fs::read_dir(folder).map_err(|why| refuse(format!("{}: {why}", folder.display())))?;
    let own = kernels(&text);
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "ptx"))
    {
        let other = std::fs::read_to_string(&path).map_err(|why| refuse(format!("{}: {why}", path.display())))?;
        let theirs = kernels(&other);
        if own == theirs {
            note(&format!("kernels from {}", path.display()));
            return Ok(other);
        }
        if let Some(name) = own.intersection(&theirs).next() {
            return Err(refuse(format!("{} has {name}, but not the same kernels beside it", path.display())));
        }
    }
    Ok(text)
}

fn kernels(text: &str) -> BTreeSet<&str> {
    let declared = text.lines().filter_map(|line| line.split_once(".entry ")).map(|(_, rest)| rest.trim_start());
    declared.map(|rest| rest.split(|c: char| c == '(' || c.is_whitespace()).next().unwrap_or(rest)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = ".visible .entry a(\n.param .u64 a_0\n)\n{\n}\n\t// .globl b\n.entry b ()\n{\n}\n";

    #[test]
    fn names_of_kernels() {
        assert_eq!(kernels(TWO), BTreeSet::from(["a", "b"]));
    }

    #[test]
    fn a_file_with_the_same_kernels_is_taken() {
        let folder = std::env::temp_dir().join(format!("cuda-emulator-replace-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let put = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        put("other.ptx", ".visible .entry c()\n{\n}\n");
        put("not_ptx.txt", TWO);
        assert_eq!(replaced(&folder, TWO.into()).unwrap(), TWO);
        let changed = format!("// changed\n{TWO}");
        put("two.ptx", &changed);
        assert_eq!(replaced(&folder, TWO.into()).unwrap(), changed);
        // One kernel of two: whoever made that file forgot something.
        put("two.ptx", ".visible .entry b()\n{\n}\n");
        assert_eq!(replaced(&folder, TWO.into()).unwrap_err().0, CUDA_ERROR_INVALID_IMAGE);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(replaced(&folder, TWO.into()).unwrap_err().0, CUDA_ERROR_INVALID_IMAGE);
    }
}
