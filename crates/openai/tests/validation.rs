//! Every rule about requests, one row each: what is wrong, which field is named, by which code. Then what
//! must be accepted, and what accepted values mean.

use openai::{ChatRequest, CompletionRequest, Limits, Prompt, Streaming};
use serde_json::{Value, json};

const LIMITS: Limits = Limits { choices: 8, prompts: 3, messages: 4, characters: 1000 };

fn chat(extra: Value) -> Result<ChatRequest, openai::Error> {
    ChatRequest::parse(
        &body(json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]}), extra),
        &LIMITS,
    )
}

fn completion(extra: Value) -> Result<CompletionRequest, openai::Error> {
    CompletionRequest::parse(&body(json!({"model": "m", "prompt": "hi"}), extra), &LIMITS)
}

fn body(mut request: Value, extra: Value) -> Vec<u8> {
    request.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    request.to_string().into_bytes()
}

#[track_caller]
fn refused(error: openai::Error, status: u16, param: &str, code: &str) {
    let found = (error.code.status(), error.param.as_deref().unwrap_or(""), error.code.name());
    assert_eq!(found, (status, param, code), "{}", error.message);
    assert!(error.message.contains(param), "{:?} does not name {param}", error.message);
    assert!(error.message.len() < 400, "{} bytes of message", error.message.len());
}

#[test]
fn wrong_values_are_named_on_both_endpoints() {
    let value = "invalid_value";
    let kind = "invalid_type";
    let unserved = "unsupported_parameter";
    let long = "x".repeat(5000);
    let rows = [
        (json!({"model": null}), "model", "missing_required_parameter"),
        (json!({"model": 5}), "model", kind),
        (json!({"temperature": -0.1}), "temperature", value),
        (json!({"temperature": 2.01}), "temperature", value),
        (json!({"temperature": "hot"}), "temperature", kind),
        (json!({"temperature": long}), "temperature", kind),
        (json!({"temperature": true}), "temperature", kind),
        (json!({"top_p": 0}), "top_p", value),
        (json!({"top_p": 1.1}), "top_p", value),
        (json!({"top_k": -2}), "top_k", value),
        (json!({"top_k": 1.5}), "top_k", value),
        (json!({"min_p": -0.1}), "min_p", value),
        (json!({"min_p": 1.1}), "min_p", value),
        (json!({"presence_penalty": 2.1}), "presence_penalty", value),
        (json!({"frequency_penalty": -2.1}), "frequency_penalty", value),
        (json!({"repetition_penalty": 0}), "repetition_penalty", value),
        (json!({"repetition_penalty": 1e-60}), "repetition_penalty", value),
        (json!({"n": 0}), "n", value),
        (json!({"n": 9}), "n", value),
        (json!({"n": 1.5}), "n", value),
        (json!({"best_of": 2}), "best_of", unserved),
        (json!({"n": 3, "best_of": 2}), "best_of", value),
        (json!({"seed": 9223372036854775808u64}), "seed", value),
        (json!({"seed": "7"}), "seed", kind),
        (json!({"stop": ""}), "stop", value),
        (json!({"stop": ["a", ""]}), "stop[1]", value),
        (json!({"stop": ["a", 5]}), "stop[1]", kind),
        (json!({"stop": 5}), "stop", kind),
        (json!({"stop": vec!["a"; 17]}), "stop", value),
        (json!({"stop": "x".repeat(1025)}), "stop", value),
        (json!({"stop_token_ids": [1, -1]}), "stop_token_ids[1]", value),
        (json!({"stop_token_ids": 1}), "stop_token_ids", kind),
        (json!({"logit_bias": {"a": 1}}), "logit_bias", value),
        (json!({"logit_bias": {"-1": 1}}), "logit_bias", value),
        (json!({"logit_bias": {"5": 101}}), "logit_bias.5", value),
        (json!({"logit_bias": {"5": "x"}}), "logit_bias.5", kind),
        (json!({"logit_bias": [1]}), "logit_bias", kind),
        (json!({"max_tokens": 0}), "max_tokens", value),
        (json!({"max_tokens": -1}), "max_tokens", value),
        (json!({"max_tokens": 1u64 << 32}), "max_tokens", value),
        (json!({"max_tokens": 4, "min_tokens": 5}), "min_tokens", value),
        (json!({"min_tokens": -1}), "min_tokens", value),
        (json!({"ignore_eos": 1}), "ignore_eos", kind),
        (json!({"priority": 1u64 << 31}), "priority", value),
        (json!({"stream": "yes"}), "stream", kind),
        (json!({"stream_options": {}}), "stream_options", value),
        (json!({"stream": false, "stream_options": {"include_usage": true}}), "stream_options", value),
        (json!({"stream": true, "stream_options": 5}), "stream_options", kind),
        (
            json!({"stream": true, "stream_options": {"include_usage": 5}}),
            "stream_options.include_usage",
            kind,
        ),
        (json!({"include_stop_str_in_output": "a"}), "include_stop_str_in_output", kind),
        (json!({"skip_special_tokens": "a"}), "skip_special_tokens", kind),
        (json!({"return_tokens_as_token_ids": "a"}), "return_tokens_as_token_ids", kind),
        (json!({"response_format": {"type": "json_object"}}), "response_format", unserved),
        (json!({"response_format": "json"}), "response_format", unserved),
        (json!({"prediction": {}}), "prediction", unserved),
        (json!({"use_beam_search": true}), "use_beam_search", unserved),
        (json!({"length_penalty": 2}), "length_penalty", unserved),
        (json!({"guided_json": {}}), "guided_json", unserved),
        (json!({"guided_regex": "a"}), "guided_regex", unserved),
        (json!({"guided_choice": ["a"]}), "guided_choice", unserved),
        (json!({"guided_grammar": "a"}), "guided_grammar", unserved),
        (json!({"structured_outputs": {}}), "structured_outputs", unserved),
        (json!({"bad_words": ["a"]}), "bad_words", unserved),
        (json!({"allowed_token_ids": [1]}), "allowed_token_ids", unserved),
        (json!({"prompt_logprobs": 1}), "prompt_logprobs", unserved),
        (json!({"truncate_prompt_tokens": 1}), "truncate_prompt_tokens", unserved),
        (json!({"cache_salt": "a"}), "cache_salt", unserved),
    ];
    for (extra, param, code) in rows {
        refused(chat(extra.clone()).unwrap_err(), 400, param, code);
        refused(completion(extra).unwrap_err(), 400, param, code);
    }
}

#[test]
fn wrong_values_are_named_in_chat() {
    let (value, kind, unserved, missing) =
        ("invalid_value", "invalid_type", "unsupported_parameter", "missing_required_parameter");
    let message = |message: Value| json!({"messages": [message]});
    let rows = [
        (json!({"messages": null}), "messages", missing),
        (json!({"messages": []}), "messages", value),
        (json!({"messages": "hi"}), "messages", kind),
        (json!({"messages": ["hi"]}), "messages[0]", kind),
        (message(json!({"content": "a"})), "messages[0].role", missing),
        (message(json!({"role": "robot", "content": "a"})), "messages[0].role", value),
        (message(json!({"role": "tool", "content": "a"})), "messages[0].role", unserved),
        (message(json!({"role": "user"})), "messages[0].content", missing),
        (message(json!({"role": "assistant", "content": null})), "messages[0].content", missing),
        (message(json!({"role": "user", "content": 5})), "messages[0].content", kind),
        (message(json!({"role": "user", "content": ["a"]})), "messages[0].content[0]", kind),
        (
            message(json!({"role": "user", "content": [{"text": "a"}]})),
            "messages[0].content[0].type",
            missing,
        ),
        (
            message(json!({"role": "user", "content": [{"type": "text"}]})),
            "messages[0].content[0].text",
            missing,
        ),
        (
            message(
                json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}),
            ),
            "messages[0].content[1].type",
            unserved,
        ),
        (
            message(json!({"role": "assistant", "content": "", "tool_calls": [{}]})),
            "messages[0].tool_calls",
            unserved,
        ),
        (json!({"tools": []}), "tools", unserved),
        (json!({"tool_choice": "auto"}), "tool_choice", unserved),
        (json!({"functions": []}), "functions", unserved),
        (json!({"audio": {}}), "audio", unserved),
        (json!({"modalities": ["text", "audio"]}), "modalities", unserved),
        (json!({"web_search_options": {}}), "web_search_options", unserved),
        (json!({"echo": true}), "echo", unserved),
        (json!({"chat_template": "x"}), "chat_template", unserved),
        (json!({"logprobs": 1}), "logprobs", kind),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", value),
        (json!({"logprobs": true, "top_logprobs": -1}), "top_logprobs", value),
        (json!({"top_logprobs": 3}), "top_logprobs", value),
        (json!({"logprobs": false, "top_logprobs": 3}), "top_logprobs", value),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens", value),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
            value,
        ),
        (json!({"chat_template_kwargs": 5}), "chat_template_kwargs", kind),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages", value),
    ];
    for (extra, param, code) in rows {
        refused(chat(extra).unwrap_err(), 400, param, code);
    }
}

#[test]
fn wrong_values_are_named_in_completions() {
    let (value, kind, unserved, missing) =
        ("invalid_value", "invalid_type", "unsupported_parameter", "missing_required_parameter");
    let rows = [
        (json!({"prompt": null}), "prompt", missing),
        (json!({"prompt": []}), "prompt", value),
        (json!({"prompt": {}}), "prompt", kind),
        (json!({"prompt": [1, -5]}), "prompt[1]", value),
        (json!({"prompt": [1, "a"]}), "prompt[1]", kind),
        (json!({"prompt": ["a", 5]}), "prompt[1]", kind),
        (json!({"prompt": [[1], []]}), "prompt[1]", value),
        (json!({"prompt": [[1], ["a"]]}), "prompt[1][0]", kind),
        (json!({"prompt": ["a", "b", "c", "d"]}), "prompt", value),
        (json!({"suffix": "a"}), "suffix", unserved),
        (json!({"logprobs": 21}), "logprobs", value),
        (json!({"logprobs": true}), "logprobs", kind),
        (json!({"echo": "a"}), "echo", kind),
    ];
    for (extra, param, code) in rows {
        refused(completion(extra).unwrap_err(), 400, param, code);
    }
}

#[test]
fn what_is_no_request_at_all() {
    for (body, says) in [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "a list"),
        ("null", "null"),
        ("\"a\"", "a string"),
    ] {
        let error = ChatRequest::parse(body.as_bytes(), &LIMITS).unwrap_err();
        refused(error.clone(), 400, "", "invalid_json");
        assert!(error.message.contains(says), "{}", error.message);
    }
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    assert_eq!(ChatRequest::parse(deep.as_bytes(), &LIMITS).unwrap_err().code, openai::Code::InvalidJson);
}

#[test]
fn null_is_absent_and_harmless_values_pass() {
    let nulls = json!({
        "temperature": null, "top_p": null, "n": null, "stop": null, "seed": null, "stream": null, "stream_options": null,
        "logprobs": null, "top_logprobs": null, "logit_bias": null, "max_tokens": null, "tools": null, "tool_choice": null,
        "response_format": null, "suffix": null, "echo": null, "guided_json": null,
    });
    assert_eq!(chat(nulls.clone()).unwrap(), chat(json!({})).unwrap());
    assert_eq!(completion(nulls).unwrap(), completion(json!({})).unwrap());
    let harmless = json!({
        "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "use_beam_search": false,
        "best_of": 1, "store": true, "metadata": {"a": "b"}, "user": "u", "service_tier": "auto", "prompt_cache_key": "k",
        "safety_identifier": "s", "parallel_tool_calls": true, "logprobs": false, "top_logprobs": 0,
    });
    assert_eq!(chat(harmless).unwrap(), chat(json!({})).unwrap());
    assert_eq!(chat(json!({"frobnicate": 1})).unwrap().parameters.unknown, ["frobnicate"]);
}

#[test]
fn accepted_values_mean_what_they_say() {
    let parameters = chat(json!({
        "temperature": 0, "top_p": 1, "top_k": -1, "seed": -1, "logit_bias": {"5": -100, "7": 1.5}, "max_tokens": 9,
        "max_completion_tokens": 7, "min_tokens": 3, "stop": "a", "stop_token_ids": [4], "n": 8.0, "priority": -3,
        "logprobs": true, "top_logprobs": 2, "stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false},
        "skip_special_tokens": false, "repetition_penalty": 1.1,
    }))
    .unwrap()
    .parameters;
    let sampling = &parameters.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (Some(0.0), Some(1.0), Some(0)));
    assert_eq!((sampling.seed, sampling.logprobs), (Some(u64::MAX), Some(2)));
    assert_eq!(sampling.logit_bias, [(5, -100.0), (7, 1.5)]);
    assert_eq!((parameters.ending.max_tokens, parameters.ending.min_tokens), (Some(7), 3));
    assert_eq!((parameters.n, parameters.priority), (8, Some(-3)));
    assert_eq!(parameters.streaming, Some(Streaming { include_usage: true, continuous_usage: false }));
    assert!(!parameters.skip_special_tokens);
}

#[test]
fn messages_keep_what_templates_may_read() {
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n", "tool_calls": []},
        {"role": "assistant", "content": "", "reasoning_content": "r", "refusal": null},
    ]);
    let request = chat(
        json!({"messages": messages, "reasoning_effort": "low", "chat_template_kwargs": {"thinking": true}}),
    )
    .unwrap();
    assert_eq!(
        serde_json::to_value(&request.messages).unwrap(),
        json!([{"role": "user", "content": "a\nb", "name": "n"}, {"role": "assistant", "content": "", "reasoning_content": "r"}])
    );
    assert_eq!(Value::Object(request.template_kwargs), json!({"thinking": true, "reasoning_effort": "low"}));
    assert!(request.add_generation_prompt);
    assert!(!chat(json!({"continue_final_message": true})).unwrap().add_generation_prompt);
}

#[test]
fn prompts_come_in_four_forms() {
    let prompts = |prompt: Value| completion(json!({"prompt": prompt})).unwrap().prompts;
    let text = |text: &str| Prompt::Text(text.into());
    assert_eq!(prompts(json!("a")), [text("a")]);
    assert_eq!(prompts(json!(["a", "b"])), [text("a"), text("b")]);
    assert_eq!(prompts(json!([1, 2, 3, 4])), [Prompt::Tokens(vec![1, 2, 3, 4])]);
    assert_eq!(prompts(json!([[1, 2], [3]])), [Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])]);
    assert_eq!(
        completion(json!({"max_tokens": 0, "echo": true})).unwrap().parameters.ending.max_tokens,
        Some(0)
    );
}
