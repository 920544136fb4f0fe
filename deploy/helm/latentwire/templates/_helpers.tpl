{{- define "check" -}}
{{- $set := dict "LW_DRAIN_DELAY" "drainDelaySeconds" "LW_DRAIN_TIMEOUT" "drainSeconds" "LW_ALLOWED_HOSTS" "allowedHosts" "LW_API_KEYS_FILE" "keysSecret" "LW_INSECURE" "keysSecret" -}}
{{- $named := list -}}
{{- range .Values.env }}{{ $named = append $named .name }}{{ end -}}
{{- range $name, $value := $set -}}
{{- if and (has $name $named) (or (ne $name "LW_ALLOWED_HOSTS") (not $.Values.keysSecret)) -}}
{{- fail (printf "env names %s, which the chart sets: use %s" $name $value) -}}
{{- end -}}
{{- end -}}
{{- range list "LW_PORT" "LW_ADMIN_PORT" -}}
{{- if has . $named -}}
{{- fail (printf "env names %s: the chart's probes and its Service want port 8000" .) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.redis.enabled (has "LW_REDIS_URL" $named) -}}
{{- fail "env names LW_REDIS_URL, and redis.enabled makes another: one of them" -}}
{{- end -}}
{{- if and (include "several" .) (not .Values.redis.enabled) (not (has "LW_REDIS_URL" $named)) -}}
{{- fail "several replicas find each other's latents in a Redis: redis.enabled, or LW_REDIS_URL in env" -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if and .enabled (not $.Values.monitoring.enabled) -}}
{{- fail "autoscaling.enabled asks Prometheus, which monitoring.enabled tells of the service" -}}
{{- end -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas is %d, above maxReplicas, %d" (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- define "several" -}}
{{- if or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) }}true{{ end -}}
{{- end -}}
{{- define "labels" -}}
app.kubernetes.io/name: latentwire
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}
{{- define "metadata" -}}
name: {{ .root.Release.Name }}{{ ne .component "service" | ternary (printf "-%s" .component) "" }}
labels:
  {{- include "labels" . | nindent 2 }}
{{- end -}}
{{- define "container security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
{{- define "models" -}}
accessModes: [ReadWriteOnce]
{{- with .Values.models.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests: {storage: {{ .Values.models.storage }}}
{{- end -}}
