{{/* What the pods of every part have in common. */}}

{{/* (dict "root" $ "part" settings "selector" (the arguments of baton.selector)): where pods go, and as whom. */}}
{{- define "baton.placement" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .part.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ .topologyKey }}
    maxSkew: {{ .maxSkew }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "baton.selector" $.selector | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "baton.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "baton.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "baton.podMeta" -}}
labels:
  {{- include "baton.selector" .selector | nindent 2 }}
  {{- with .part.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := merge (dict) (.part.podAnnotations | default dict) }}
{{- with .config }}{{ $_ := set $annotations "checksum/config" (sha256sum .) }}{{ end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* (dict "root" $ "part" settings) */}}
{{- define "baton.env" -}}
- {name: BATON_LOG, value: {{ .root.Values.log.filter | quote }}}
- {name: BATON_LOG_FORMAT, value: {{ .root.Values.log.format | quote }}}
{{- with .part.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Liveness asks whether the process answers, readiness whether it would serve; both on the admin port. The argument is the path of readiness. */}}
{{- define "baton.probes" -}}
livenessProbe:
  httpGet: {path: /health, port: admin}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: {{ . }}, port: admin}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}

{{/* (dict "root" $ "name" "x" "component" "router" "pool" "" "budget" settings). Who sets minAvailable still has the default of the other, and
a budget cannot have both. */}}
{{- define "baton.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "baton.labels" . | nindent 4 }}
spec:
  {{- toYaml (ternary (pick .budget "minAvailable") .budget (hasKey .budget "minAvailable")) | nindent 2 }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "baton.selector" . | nindent 6 }}
{{- end -}}

{{- define "baton.any" -}}
{{- ternary "[::]" "0.0.0.0" .Values.ipv6 -}}
{{- end -}}

{{/* How a pod is reached by its address. */}}
{{- define "baton.podHost" -}}
{{- ternary "[$(POD_IP)]" "$(POD_IP)" .Values.ipv6 -}}
{{- end -}}
