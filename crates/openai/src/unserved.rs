//! Fields that Baton knows and does not serve yet: a 400 that names the field, never silence. Beside them
//! the fields that change nothing about the answer, which are accepted and ignored.

use crate::Error;
use crate::fields::{Fields, show};
use serde_json::Value;

/// (field, whether this value asks for nothing). An absent or null field never gets here.
type Rule = (&'static str, fn(&Value) -> bool);

const CHAT: &[Rule] = &[
    ("tools", never),
    ("tool_choice", is_none),
    ("functions", never),
    ("function_call", is_none),
    ("audio", never),
    ("modalities", text_only),
    ("web_search_options", never),
    ("verbosity", never),
    ("echo", is_false),
    ("chat_template", never),
    ("documents", never),
    ("thinking_token_budget", never),
];

const COMPLETIONS: &[Rule] = &[("suffix", is_empty)];

const BOTH: &[Rule] = &[
    ("response_format", plain_text),
    ("prediction", never),
    ("use_beam_search", is_false),
    ("early_stopping", is_false),
    ("length_penalty", is_one),
    ("guided_json", never),
    ("guided_regex", never),
    ("guided_choice", never),
    ("guided_grammar", never),
    ("structured_outputs", never),
    ("regex", never),
    ("ebnf", never),
    ("json_schema", never),
    ("stop_regex", never),
    ("no_stop_trim", is_false),
    ("bad_words", is_empty),
    ("allowed_token_ids", never),
    ("logits_processors", is_empty),
    ("custom_logit_processor", never),
    ("repetition_detection", never),
    ("prompt_logprobs", never),
    ("logprob_token_ids", never),
    ("return_token_ids", is_false),
    ("return_prompt_text", is_false),
    ("truncate_prompt_tokens", never),
    ("spaces_between_special_tokens", is_true),
    ("cache_salt", never),
    ("kv_transfer_params", never),
    ("mm_processor_kwargs", never),
    ("prompt_embeds", never),
];

/// Accepted: they name, bill, store or route, and do not change the answer.
const IGNORED: &[&str] = &[
    "store",
    "metadata",
    "user",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "moderation",
    "parallel_tool_calls",
    "request_id",
    "session_id",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
];

pub(crate) fn refuse_chat(fields: &mut Fields) -> Result<(), Error> {
    refuse(fields, CHAT)?;
    refuse(fields, BOTH)
}

pub(crate) fn refuse_completions(fields: &mut Fields) -> Result<(), Error> {
    refuse(fields, COMPLETIONS)?;
    refuse(fields, BOTH)
}

pub(crate) fn ignore(fields: &mut Fields) {
    for name in IGNORED {
        fields.take(name);
    }
}

fn refuse(fields: &mut Fields, rules: &[Rule]) -> Result<(), Error> {
    for (name, harmless) in rules {
        if let Some(value) = fields.take(name).filter(|value| !harmless(value)) {
            return Err(Error::unsupported(
                fields.path(name),
                format!("known, but not served yet (found {}); leave the field out", show(&value)),
            ));
        }
    }
    Ok(())
}

fn never(_: &Value) -> bool {
    false
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_true(value: &Value) -> bool {
    *value == Value::Bool(true)
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_none(value: &Value) -> bool {
    value == "none"
}

fn is_empty(value: &Value) -> bool {
    value == "" || value.as_array().is_some_and(Vec::is_empty)
}

fn text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.len() == 1 && list[0] == "text")
}

fn plain_text(value: &Value) -> bool {
    value.get("type").is_some_and(|kind| kind == "text")
}
