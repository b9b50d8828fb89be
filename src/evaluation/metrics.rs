//! Metrics from ranks and from lists. The module above has an example.

use crate::error::{Result, missing, shape, value};
use crate::memory::zeroed;
use crate::problem::arrays::check_csr;
use crate::problem::embeddings::Real;
use crate::problem::search::TopK;
use crate::problem::statistics::RowStatistics;

/// The places of relevant items in each row's ranking, counted from 0. A metric is the mean over the rows that have a
/// relevant item, and NaN if there are none.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ranking {
    rows: Vec<RowPlaces>,
    /// K of the lists that the places come from; `None` if places are exact.
    k: Option<usize>,
}

#[derive(Debug, Clone, PartialEq)]
struct RowPlaces {
    /// Places of the relevant items that are ranked, ascending, from 0.
    places: Vec<u64>,
    /// Relevant items, ranked or not.
    relevant: usize,
}

impl Ranking {
    /// Each row's positive as its one relevant item, at its exact place among all negatives: `above + ties`.
    ///
    /// A row has no place, and so counts as a miss, if its positive's score or its lse is NaN. A candidate with a NaN
    /// makes lse NaN in every row that has it as a negative, because it can be counted neither as above the positive
    /// nor as tied with it. A search instead leaves such a candidate out.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) where the statistics were not asked
    /// [`with_rank`](crate::Request::with_rank).
    pub fn of_positives<T>(statistics: &RowStatistics<T>) -> Result<Ranking> {
        let Some(rank) = &statistics.rank else {
            return Err(missing("statistics.rank", "ranks come with Request::with_rank()"));
        };
        let places = rank.above.iter().zip(&rank.ties).map(|(above, ties)| above + ties);
        let scores = statistics.positive.iter().zip(&statistics.lse);
        let rows = places.zip(scores).map(|(place, (positive, lse))| {
            // Nothing is above NaN, and NaN is above nothing.
            let places = if positive.is_nan() || lse.is_nan() { vec![] } else { vec![place] };
            RowPlaces { places, relevant: 1 }
        });
        Ok(Ranking { rows: rows.collect(), k: None })
    }

    /// Each row's relevant items at their places in the row's list. Those of row i are
    /// `relevant[offsets[i]..offsets[i + 1]]`. Give indices over the candidates, as the lists do, and not item ids: an
    /// id that is taken for an index is simply not found, without an error.
    ///
    /// Items outside the list have no place, so a metric of more places than the list's K is an error. Of items with
    /// equal scores the relevant ones are placed last. The list does not show items outside of it that tie with its
    /// last one; if that matters, search for more than the metric looks at. An index past the candidates counts as a
    /// relevant item that is not found.
    ///
    /// # Errors
    /// [`Error`](crate::Error) where offsets (B + 1) do not start at 0, fall, or do not end with the number of items.
    pub fn in_lists<T: Real>(top: &TopK<T>, offsets: &[i64], relevant: &[u32]) -> Result<Ranking> {
        check_csr(("offsets", offsets), ("relevant", relevant.len()), top.num_rows())?;
        let rows = (0..top.num_rows()).map(|row| {
            let mut relevant = relevant[offsets[row] as usize..offsets[row + 1] as usize].to_vec();
            relevant.sort_unstable();
            relevant.dedup();
            RowPlaces { places: places(top.row(row), &relevant), relevant: relevant.len() }
        });
        Ok(Ranking { rows: rows.collect(), k: Some(top.k) })
    }

    /// Adds the rows of another ranking, of the next block of queries.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) where both have rows and the places come from lists of different K, or
    /// from lists in one and are exact in the other. No row is then added.
    pub fn append(&mut self, other: Ranking) -> Result<()> {
        if self.rows.is_empty() {
            *self = other;
        } else if !other.rows.is_empty() {
            if self.k != other.k {
                let rule = format!("{}, as in the rows before", depth(self.k));
                return Err(value("the ranking to append", depth(other.k), rule));
            }
            self.rows.extend(other.rows);
        }
        Ok(())
    }

    /// K of the lists that the places come from. None where places are exact, over the whole catalogue.
    pub fn k(&self) -> Option<usize> {
        self.k
    }

    /// Number of rows, those without a relevant item too.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Of each row, the places of the relevant items that have one, ascending, and how many relevant items there are,
    /// with or without a place. For metrics of single rows, as a confidence interval needs them:
    ///
    /// ```
    /// # use catalog_softmax::evaluation::Ranking;
    /// # use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Request, Similarity};
    /// # let x: Vec<f32> = (0..50 * 8).map(|i| ((i * i) as f32).sin()).collect();
    /// # let y: Vec<f32> = (0..50 * 8).map(|i| x[i] + ((i * 7) as f32).cos()).collect();
    /// # let batch = Batch::in_batch(Embeddings::new(&x, 50, 8), Embeddings::new(&y, 50, 8)).build()?;
    /// # let loss = Loss::softmax(Similarity::Cosine, 0.1);
    /// # let statistics = Cpu::new().statistics(&batch, &loss, Request::value().with_rank())?;
    /// let ranking = Ranking::of_positives(&statistics)?;
    /// // One relevant item each: a row without a place has a reciprocal rank of 0.
    /// let reciprocal = |(places, _): (&[u64], usize)| places.first().map_or(0.0, |&place| 1.0 / (place as f64 + 1.0));
    /// let (mean, n) = (ranking.mrr(), ranking.len() as f64);
    /// let variance = ranking.rows().map(|row| (reciprocal(row) - mean).powi(2)).sum::<f64>() / (n - 1.0);
    /// let standard_error = (variance / n).sqrt();
    /// # assert!(mean > 0.0 && standard_error > 0.0 && standard_error < 0.1, "{mean} {standard_error}");
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    pub fn rows(&self) -> impl ExactSizeIterator<Item = (&[u64], usize)> {
        self.rows.iter().map(|row| (&row.places[..], row.relevant))
    }

    /// Recall@K: the share of a row's relevant items that stand among the first `k`. With one relevant item it is the
    /// hit rate.
    ///
    /// `mean_i |{places of row i < k}| / |relevant_i|`
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) where the places come from lists of fewer than `k`, which do not show what
    /// stands there.
    pub fn recall_at(&self, k: usize) -> Result<f64> {
        self.check_k(k)?;
        Ok(self.mean(|row| row.first(k).count() as f64 / row.relevant as f64))
    }

    /// NDCG@K with relevance 0 or 1 (Järvelin and Kekäläinen, "Cumulated Gain-Based Evaluation of IR Techniques", TOIS
    /// 2002, with the discount of every place by `log2`): the gain of the relevant items among the first `k`, relative
    /// to that of a list that begins with them.
    ///
    /// `mean_i Σ_{places p of row i < k} 1 / log2(p + 2)  /  Σ_{p < min(k, |relevant_i|)} 1 / log2(p + 2)`; 0 for `k`
    /// 0.
    ///
    /// # Errors
    /// As [`recall_at`](Ranking::recall_at).
    pub fn ndcg_at(&self, k: usize) -> Result<f64> {
        self.check_k(k)?;
        let gain = |place: u64| 1.0 / (place as f64 + 2.0).log2();
        Ok(self.mean(|row| {
            let ideal = sum((0..k.min(row.relevant) as u64).map(gain));
            let found = sum(row.first(k).map(gain));
            if ideal == 0.0 { 0.0 } else { found / ideal }
        }))
    }

    /// Mean reciprocal rank (Voorhees, "The TREC-8 Question Answering Track Report", 1999) of the first relevant item.
    ///
    /// `mean_i 1 / (1 + least place of row i)`; a row with no place has 0. From lists of K it is therefore MRR@K, in
    /// which an item past the first K counts as not found.
    pub fn mrr(&self) -> f64 {
        self.mean(|row| row.places.first().map_or(0.0, |&place| 1.0 / (place as f64 + 1.0)))
    }

    fn check_k(&self, k: usize) -> Result<()> {
        match self.k {
            Some(of_lists) if k > of_lists => Err(value("k", k, format!("at most {of_lists}, the K of the lists"))),
            _ => Ok(()),
        }
    }

    fn mean(&self, metric: impl Fn(&RowPlaces) -> f64) -> f64 {
        let rows = || self.rows.iter().filter(|row| row.relevant > 0);
        sum(rows().map(metric)) / rows().count() as f64
    }
}

fn depth(k: Option<usize>) -> String {
    k.map_or("one of exact places".into(), |k| format!("one of lists of K = {k}"))
}

/// Not `Iterator::sum`, whose sum of no numbers is −0.
fn sum(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |sum, value| sum + value)
}

impl RowPlaces {
    /// The places before `k`.
    fn first(&self, k: usize) -> impl Iterator<Item = u64> {
        self.places.iter().copied().take_while(move |&place| place < k as u64)
    }
}

/// Places in a list of those that are relevant (ascending indices): the last ones of each run of equal scores.
fn places<T: Real>((indices, scores): (&[u32], &[T]), relevant: &[u32]) -> Vec<u64> {
    let mut places = Vec::new();
    let mut end = 0;
    for run in scores.chunk_by(|a, b| a == b) {
        let start = end;
        end += run.len();
        let hits = indices[start..end].iter().filter(|index| relevant.binary_search(index).is_ok()).count();
        places.extend((end - hits..end).map(|place| place as u64));
    }
    places
}

/// How often each item of a catalogue is in the lists that were added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recommended {
    counts: Vec<u64>,
}

impl Recommended {
    /// A catalogue of `num_items` items, none of which has been recommended yet.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) if there is not enough memory for the counts.
    pub fn new(num_items: usize) -> Result<Recommended> {
        let counts =
            zeroed(num_items).ok_or_else(|| value("num_items", num_items, "no more than memory holds counts of"))?;
        Ok(Recommended { counts })
    }

    /// Counts the items of each row's list.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for an index past the catalogue; nothing is then counted.
    pub fn add<T: Real>(&mut self, top: &TopK<T>) -> Result<()> {
        let items = || (0..top.num_rows()).flat_map(|row| top.row(row).0).map(|&index| index as usize);
        if let Some(index) = items().find(|&index| index >= self.counts.len()) {
            return Err(value("an index of the lists", index, "less than the number of items"));
        }
        items().for_each(|index| self.counts[index] += 1);
        Ok(())
    }

    /// Catalogue coverage (Ge, Delgado-Battenfeld and Jannach, "Beyond Accuracy", RecSys 2010): the share of all items
    /// that are in some list. NaN for a catalogue of no items.
    pub fn coverage(&self) -> f64 {
        self.counts.iter().filter(|&&count| count > 0).count() as f64 / self.counts.len() as f64
    }

    /// Mean of `popularity` (N) over all places of all lists: average recommendation popularity (Yin et al.,
    /// "Challenging the Long Tail Recommendation", VLDB 2012) where lists are of one length. Give interaction counts,
    /// or their logarithms, which a few very popular items do not dominate. 0 where nothing is recommended.
    ///
    /// `Σ_j count_j popularity_j / Σ_j count_j`
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a length other than N.
    pub fn mean_popularity(&self, popularity: &[f64]) -> Result<f64> {
        let n = self.counts.len();
        if popularity.len() != n {
            let found = format!("length {}", popularity.len());
            return Err(shape("popularity", found, format!("length {n}, the number of items")));
        }
        let total: u64 = self.counts.iter().sum();
        // An item that is in no list may have a popularity of log 0.
        let there = self.counts.iter().zip(popularity).filter(|(count, _)| **count > 0);
        let sum = sum(there.map(|(&count, popularity)| count as f64 * popularity));
        Ok(sum / total.max(1) as f64)
    }
}
