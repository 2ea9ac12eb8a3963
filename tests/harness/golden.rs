//! Known answers and reference vectors of the demo model.

use super::root;
use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
pub struct Golden {
    pub question: String,
    pub answer: String,
    pub prompt_ids: Vec<u32>,
    /// The last is end-of-sentence.
    pub answer_ids: Vec<u32>,
}

pub fn golden() -> Vec<Golden> {
    let text = std::fs::read_to_string(root().join("deploy/demo/golden.jsonl")).unwrap();
    let all: Vec<Golden> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(all.len(), 276);
    all
}

#[derive(Clone, Debug, Deserialize)]
pub struct Reference {
    pub name: String,
    pub ids: Vec<u32>,
    /// 48 greedy tokens, not stopped at end-of-sentence.
    pub greedy: Vec<u32>,
    /// Gap between the two best logits at each.
    pub margins: Vec<f32>,
}

pub fn references() -> Vec<Reference> {
    #[derive(Deserialize)]
    struct File {
        prompts: Vec<Reference>,
    }
    let text = std::fs::read_to_string(root().join("deploy/demo/reference.json")).unwrap();
    serde_json::from_str::<File>(&text).unwrap().prompts
}

/// `length` token ids of real prose: the longest reference prompts, over and over.
pub fn prose(length: usize, salt: usize) -> Vec<u32> {
    let all: Vec<u32> =
        references().into_iter().flat_map(|reference| reference.ids.into_iter().skip(1)).collect();
    std::iter::once(0).chain(all.iter().copied().cycle().skip(salt * 13)).take(length).collect()
}
