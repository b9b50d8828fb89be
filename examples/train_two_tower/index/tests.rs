use super::*;
use catalog_softmax::{Cpu, Pool, Search};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::evaluate::Scorer;
use crate::generate;
use crate::objective::ItemLists;

const DIM: usize = 16;

/// Random directions; lengths from 1 to 7, which a cosine does not see and an inner product does.
fn table(rows: usize, seed: u64) -> Parameter {
    let mut table = Parameter::random(rows, DIM, &mut StdRng::seed_from_u64(seed)).unwrap();
    for (row, values) in table.values.chunks_mut(DIM).enumerate() {
        values.iter_mut().for_each(|x| *x *= (1 + row % 7) as f32);
    }
    table
}

fn exact(items: &Parameter, queries: &Parameter, excluded: &[&[u32]], k: usize) -> Vec<Vec<u32>> {
    let ids: Vec<u64> = (0..items.rows as u64).collect();
    let mut csr = ItemLists::default();
    csr.set(excluded.iter().copied());
    let pool = Pool::new(Embeddings::new(&items.values, items.rows, DIM)).ids(&ids);
    let search = Search::builder(Embeddings::new(&queries.values, queries.rows, DIM), pool)
        .excluded_ids(&csr.offsets, &csr.items)
        .build()
        .unwrap();
    let top = Cpu::new().top_k(&search, Similarity::Cosine, k).unwrap();
    (0..queries.rows).map(|row| top.row(row).0.to_vec()).collect()
}

#[test]
fn lists_of_a_random_catalogue_are_nearly_the_exact_ones() {
    let (items, queries) = (table(800, 1), table(50, 2));
    // The best items of each query are excluded, more than a list is long: the list must come from behind them.
    let best = exact(&items, &queries, &vec![&[][..]; 50], 25);
    let excluded: Vec<&[u32]> = best.iter().map(|best| &best[..]).collect();
    let index = ItemIndex::build(&items, HnswOptions { m: 16, ef_construction: 100, ef_search: 1 });
    let mut shared = 0;
    for (row, expected) in exact(&items, &queries, &excluded, 10).iter().enumerate() {
        let found = index.top_k(queries.row(row), excluded[row], 10);
        assert_eq!(found.len(), 10);
        assert!(found.iter().all(|item| !excluded[row].contains(item)));
        shared += expected.iter().filter(|item| found.contains(item)).count();
    }
    // 500 are the exact lists. Random lists would share 6.
    assert!(shared > 350, "{shared} of 500");
}

/// An item's cosine with itself is 1 up to rounding, above it for some.
#[test]
fn an_item_finds_itself() {
    let items = table(400, 6);
    let index = ItemIndex::build(&items, HnswOptions::default());
    let own = (0..items.rows).filter(|&item| index.top_k(items.row(item), &[], 1) == [item as u32]).count();
    assert!(own > 360, "{own} of 400");
}

/// With no more than M items each is a neighbour of each: a search that keeps them all sees them all.
#[test]
fn lists_of_a_tiny_catalogue_are_the_exact_ones() {
    let mut items = table(13, 3);
    items.values[2 * DIM..3 * DIM].fill(0.0);
    items.values[5 * DIM] = f32::NAN;
    let queries = table(20, 4);
    let most: Vec<u32> = (0..9).collect();
    for excluded in [&[][..], &[0, 3, 7], &most] {
        let expected = exact(&items, &queries, &[excluded; 20], 6);
        for options in ["hnsw:16:13:13", "hnsw:255:4294967295:4294967295"] {
            let index = ItemIndex::build(&items, options.parse().unwrap());
            for (row, expected) in expected.iter().enumerate() {
                assert_eq!(&index.top_k(queries.row(row), excluded, 6), expected, "{options}, row {row}");
            }
        }
    }
}

#[test]
fn users_of_a_split_get_what_they_had_not_taken() {
    let split = Split::new(generate::sequences(40, 300)).unwrap();
    let mut model = Model::new(split.num_items(), DIM, 0.1, &mut StdRng::seed_from_u64(5)).unwrap();
    // The best items for a user are those that the user has taken: a list with them shares little with the exact one.
    model.items = model.history.clone();
    let folder = tempfile::tempdir().unwrap();
    let options = HnswOptions::default();
    let comparison = compare(&model, &split, 20, options, folder.path(), &mut Cpu::new()).unwrap();
    assert_eq!(comparison.queries, split.test.queries.len());
    assert_eq!(comparison.listed, 10 * split.test.queries.len());
    // EF_SEARCH is nearly the catalogue: what is missing is what the graph does not reach.
    assert!(comparison.recall() > 0.9, "{}", comparison.recall());
    let all = evaluate::rank(Scorer::Model(&model, 20), &split, &split.test, &mut Cpu::new()).unwrap();
    let share = comparison.exact.targets as f64 / comparison.targets as f64;
    assert!((share - all.recall_at_10).abs() < 1e-12, "{share} {}", all.recall_at_10);
    assert!(comparison.bytes > comparison.vector_bytes);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the files of the index are removed");
}

#[test]
fn options_have_defaults_and_a_name() {
    for (text, name) in [
        ("hnsw", "hnsw:16:128:128"),
        ("hnsw:32", "hnsw:32:128:128"),
        ("hnsw:2:1", "hnsw:2:1:128"),
        ("hnsw:255:300:4294967295", "hnsw:255:300:4294967295"),
    ] {
        let options: HnswOptions = text.parse().unwrap();
        assert_eq!(options.to_string(), name);
        assert_eq!(name.parse(), Ok(options));
    }
}

#[test]
fn bad_options_are_an_error_with_field_and_rule() {
    for (text, message) in [
        ("", "\"\" is none of the indices; rule: hnsw[:M"),
        ("ivf", "\"ivf\" is none of the indices; rule: hnsw[:M"),
        ("hnsw:1:2:3:4", "\"hnsw:1:2:3:4\" is none of the indices"),
        ("hnsw:1", "M of hnsw[:M[:EF_CONSTRUCTION[:EF_SEARCH]]] is \"1\"; rule: a whole number from 2 to 255"),
        ("hnsw:256", "M of"),
        ("hnsw::8", "M of"),
        ("hnsw:8:0", "EF_CONSTRUCTION of"),
        ("hnsw:8:8:x", "EF_SEARCH of"),
        ("hnsw:8:8:4294967296", "EF_SEARCH of"),
        ("hnsw:8:8:-1", "EF_SEARCH of"),
    ] {
        let error = text.parse::<HnswOptions>().expect_err(text);
        assert!(error.starts_with(message), "{error}");
    }
}
