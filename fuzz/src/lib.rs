//! What the targets share: seeds, checksums, and what a state that was accepted has to do.

use std::path::{Path, PathBuf};

use catalog_softmax::negatives::FrequencyEstimator;

#[path = "../../testing/src/forge.rs"]
pub mod forge;

/// Writes inputs to begin with into the corpus, the first folder of the command line. Made anew each time, they follow
/// the format.
pub fn seed(seeds: impl IntoIterator<Item = Vec<u8>>) {
    let corpus = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).map(PathBuf::from);
    let Some(corpus) = corpus.filter(|corpus| corpus.is_dir()) else { return };
    for (i, seed) in seeds.into_iter().enumerate() {
        std::fs::write(corpus.join(format!("seed-{i:03}")), seed).expect("the corpus is writable");
    }
}

/// The files of a folder of the project, in the order of their names.
pub fn files(folder: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("a folder").flatten().map(|file| file.path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a file")).collect()
}

/// States of one estimator after streams of growing length.
pub fn estimator_seeds<E: FrequencyEstimator + Clone>(empty: E) -> Vec<Vec<u8>> {
    let after = |ids: u64| {
        let mut estimator = empty.clone();
        estimator.observe(&(0..ids).map(|i| i * i % 23 << (i % 60)).collect::<Vec<_>>());
        estimator.to_bytes()
    };
    [0, 1, 2, 10, 100].map(after).into()
}

/// Bytes as they are, and with a right checksum: an error, or a state that goes on, gives a finite log_q for every id,
/// and is restored from what it saves, before and after.
pub fn check_estimator<E: FrequencyEstimator>(bytes: &[u8]) {
    if let Ok(estimator) = E::from_bytes(bytes) {
        assert_eq!(estimator.to_bytes(), bytes);
    }
    let forged = forge::estimator(bytes.to_vec());
    let Ok(mut estimator) = E::from_bytes(&forged) else { return };
    assert_eq!(estimator.to_bytes(), forged);
    let mut ids = vec![0, 1, 1, 23, u64::MAX];
    ids.extend(bytes.chunks_exact(8).take(8).map(|id| u64::from_le_bytes(id.try_into().expect("8 bytes"))));
    for _ in 0..2 {
        let log_q = estimator.log_q(&ids);
        assert!(log_q.iter().all(|log_q| log_q.is_finite() && *log_q <= 0.0), "{log_q:?}");
        estimator.observe(&ids);
        let saved = estimator.to_bytes();
        let restored = E::from_bytes(&saved).expect("a state as it was saved");
        assert_eq!(restored.to_bytes(), saved);
    }
}
